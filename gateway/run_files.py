"""What ``coe serve`` leaves on this machine: the embedded store's data, and the store's address.

Each configuration file has a folder of its own for either. The data stays; the address, which holds
the store's password, is in a file for its owner alone while ``coe serve`` runs, so that other
commands of the same user can reach the store.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from experts.catalogue import cache_dir

__all__ = ["AlreadyRunning", "claimed_data_folder", "data_folder", "noted_store", "running_store"]

_DIGEST_HEX_DIGITS = 12


class AlreadyRunning(Exception):
    """Another process holds the data folder of this configuration."""


def data_folder(config: Path, environ: Mapping[str, str]) -> Path:
    """The embedded store's: below XDG_STATE_HOME/coe, else ~/.local/state/coe."""
    xdg = environ.get("XDG_STATE_HOME")
    home = environ.get("HOME")
    state = Path(xdg) if xdg else (Path(home) if home else Path.home()) / ".local" / "state"
    return state.absolute() / "coe" / _name_of(config)


@contextlib.contextmanager
def claimed_data_folder(config: Path, environ: Mapping[str, str]) -> Iterator[Path]:
    """The data folder, made if need be, for this process alone. Raises AlreadyRunning or OSError.

    Two servers must not write to one folder. The claim ends with the process, however it ends.
    """
    folder = data_folder(config, environ)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (folder / "lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(str(folder)) from None
        yield folder


@contextlib.contextmanager
def noted_store(config: Path, url: str, environ: Mapping[str, str]) -> Iterator[Path]:
    """The store's address is on file while this runs. Raises OSError."""
    path = _note_path(config, environ)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    process = psutil.Process()
    note = {"pid": process.pid, "started": process.create_time(), "redis_url": url}
    fresh = path.with_suffix(f".{process.pid}")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(note, file)
    fresh.replace(path)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def running_store(config: Path, environ: Mapping[str, str]) -> str | None:
    """The address that a live ``coe serve`` of this configuration has noted; None: none runs.

    A note whose writer is dead is of no use to anybody: the store died with it.
    """
    try:
        note = json.loads(_note_path(config, environ).read_text())
        process = psutil.Process(note["pid"])
        same = process.create_time() == note["started"]
        alive = same and process.status() != psutil.STATUS_ZOMBIE
    except (FileNotFoundError, ValueError, KeyError, psutil.NoSuchProcess):
        return None
    return str(note["redis_url"]) if alive else None


def _note_path(config: Path, environ: Mapping[str, str]) -> Path:
    return cache_dir(environ) / "run" / f"{_name_of(config)}.json"


def _name_of(config: Path) -> str:
    """Readable, and different for every file."""
    path = config.resolve()
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:_DIGEST_HEX_DIGITS]
    return f"{path.parent.name or 'root'}-{digest}"
