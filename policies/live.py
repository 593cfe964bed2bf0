"""Policies that can change while the gateway runs.

A folder of policy files is validated before it takes effect, file by file: a broken file keeps its
old version in service and its error on record. Versions from the shared store (``set_overrides``)
stand before those of the files. What is in force is one immutable ``PolicySet``, replaced by a
single assignment, so a request that has taken ``current`` sees one version to its end. The
watcher's owner is one event loop; its methods may be called from there at any time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from watchfiles import awatch

from experts.errors import ConfigError
from policies.loader import load_policy
from policies.policy_set import Override, PolicySet, joined
from policies.types import Policy

__all__ = ["PolicySet", "PolicyWatcher", "ReloadReport"]

SUFFIX = ".yaml"
_RESCAN_MS = 5_000  # also finds changes on file systems without notifications


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """What a reload did, by policy name; ``errors`` by file name."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    errors: Mapping[str, ConfigError] = field(default_factory=dict)

    @property
    def any_change(self) -> bool:
        return bool(self.added or self.changed or self.removed)


class PolicyWatcher:
    """Holds the policies of a folder and follows its changes between ``start`` and ``aclose``."""

    def __init__(
        self,
        dir: Path,
        catalogue_ids: Collection[str] | None,
        default: str,
        on_change: Callable[[PolicySet], None] | None = None,
    ) -> None:
        """Loads the folder. Raises ConfigError if any file is wrong or the default is missing.

        ``on_change`` is called on the event loop after each swap and must not raise.
        """
        self._dir = dir
        self._catalogue_ids = catalogue_ids
        self._default = default
        self._on_change = on_change
        self._task: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._overrides: Mapping[str, Override] = {}
        self._file_errors: Mapping[str, ConfigError] = {}
        self._errors: Mapping[str, ConfigError] = {}
        self._files: Mapping[str, Policy] = self._load_at_start()
        self._current = PolicySet(MappingProxyType(dict(sorted(self._files.items()))), default)

    @property
    def current(self) -> PolicySet:
        return self._current

    @property
    def files(self) -> Mapping[str, Policy]:
        """What the files say, in force or not."""
        return self._files

    @property
    def errors(self) -> Mapping[str, ConfigError]:
        """By file name, or ``store:`` and policy: what is wrong with versions not in force."""
        return self._errors

    async def start(self) -> None:
        """Begin to follow changes; a second call changes nothing."""
        if self._task is None:
            self._stop.clear()
            self._task = asyncio.create_task(self._watch(), name="policy-watcher")

    async def aclose(self) -> None:
        """Stop following changes; the policies stay usable."""
        task, self._task = self._task, None
        if task is not None:
            self._stop.set()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def reload_now(self) -> ReloadReport:
        """Read the folder again and put every valid file in force. Never raises ConfigError."""
        loaded, errors = self._read_folder()
        self._files = {**loaded, **self._kept(self._files, loaded, errors)}
        self._file_errors = errors
        return self._put_in_force()

    def set_overrides(self, overrides: Mapping[str, Override]) -> ReloadReport:
        """What the shared store says now. Never raises ConfigError."""
        self._overrides = dict(overrides)
        return self._put_in_force()

    def _put_in_force(self) -> ReloadReport:
        before = self._current
        after, wrong = joined(self._files, self._overrides, before, self._catalogue_ids)
        self._errors = MappingProxyType({**self._file_errors, **wrong})
        report = _difference(before.policies, after.policies, self._errors)
        if after != before:
            self._current = after
            if self._on_change is not None:
                self._on_change(after)
        return report

    def _load_at_start(self) -> Mapping[str, Policy]:
        loaded, errors = self._read_folder()
        if errors:
            raise next(iter(errors.values()))
        if self._default not in loaded:
            raise self._default_missing(loaded)
        return loaded

    def _read_folder(self) -> tuple[dict[str, Policy], dict[str, ConfigError]]:
        loaded: dict[str, Policy] = {}
        errors: dict[str, ConfigError] = {}
        try:
            paths = sorted(self._dir.iterdir())
        except OSError as error:
            reason = f"the policies folder cannot be read: {error.strerror}"
            return {}, {str(self._dir): ConfigError(str(self._dir), None, "", reason)}
        for path in paths:
            try:
                if path.suffix == ".yml":
                    raise ConfigError(str(path), None, "", f"rename it to {path.stem}{SUFFIX}")
                if path.suffix == SUFFIX and not path.name.startswith("."):
                    loaded[path.stem] = load_policy(path, self._catalogue_ids)
            except ConfigError as error:
                errors[path.name] = error
        return loaded, errors

    def _kept(
        self,
        before: Mapping[str, Policy],
        loaded: Mapping[str, Policy],
        errors: dict[str, ConfigError],
    ) -> dict[str, Policy]:
        """Old versions that stay: of broken files, of the default, of an unreadable folder."""
        if str(self._dir) in errors:
            return dict(before)
        if self._default not in loaded and f"{self._default}{SUFFIX}" not in errors:
            errors[f"{self._default}{SUFFIX}"] = self._default_missing(loaded)
        return {name: policy for name, policy in before.items() if f"{name}{SUFFIX}" in errors}

    def _default_missing(self, loaded: Collection[str]) -> ConfigError:
        found = ", ".join(sorted(loaded)) or "none"
        reason = f"the default policy {self._default!r} has no file; found: {found}"
        return ConfigError(str(self._dir / f"{self._default}{SUFFIX}"), None, "", reason)

    async def _watch(self) -> None:
        """Reload when the folder changes; outlives a folder that is replaced or unreadable."""
        seen = _signature(self._dir)
        self.reload_now()  # what changed between the constructor and here
        while not self._stop.is_set():
            try:
                async for _ in awatch(
                    self._dir,
                    watch_filter=None,
                    recursive=False,
                    stop_event=self._stop,
                    rust_timeout=_RESCAN_MS,
                    yield_on_timeout=True,
                ):
                    if (now := _signature(self._dir)) != seen:
                        seen = now
                        self.reload_now()
            except (OSError, RuntimeError):
                seen = ()
                self.reload_now()  # records that the folder cannot be read
                await asyncio.sleep(_RESCAN_MS / 1000)


def _signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Cheap to compare on every timer tick, where file notifications do not arrive."""
    try:
        stats = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    except OSError:
        return ()
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def _difference(
    before: Mapping[str, Policy], after: Mapping[str, Policy], errors: Mapping[str, ConfigError]
) -> ReloadReport:
    return ReloadReport(
        added=tuple(sorted(after.keys() - before.keys())),
        changed=tuple(sorted(n for n in after.keys() & before.keys() if after[n] != before[n])),
        removed=tuple(sorted(before.keys() - after.keys())),
        errors=MappingProxyType(dict(errors)),
    )
