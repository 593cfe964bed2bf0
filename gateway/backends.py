"""Who to call for an expert: the best host of the registry, a remote server, or a script."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

from deployments.choose_host import choose_host, expected_wait_ms, is_resident
from deployments.host_record import HostRecord
from experts.errors import HostUnavailable
from experts.http_backend import HttpBackend, PoolLimits
from experts.protocol import Backend
from experts.scripted import Script, ScriptedBackend
from experts.types import ExpertSpec, SourceKind
from gateway.breakers import expert_target, host_target
from gateway.waiting_calls import WaitingCalls
from policies.types import Candidate

__all__ = ["BackendPool", "Directory", "Lease"]

HOST_BACKENDS_MAX = 256
SUSPECT_MS = 5_000.0  # long enough for the registry to notice a dead host by its missing heartbeat


class Directory(Protocol):
    """The gateway's view of the hosts; ``deployments.host_directory.HostDirectory`` is one."""

    def hosts_for(self, expert: str) -> list[HostRecord]: ...

    def mark_suspect(self, host_id: str, until_ms: float) -> None: ...

    def note_dispatched(self, host_id: str, expert: str) -> None: ...


class Breakers(Protocol):
    """What is asked of the breakers here; ``gateway.state.breakers.BreakerBoard`` is one."""

    def wait_ms(self, target: str, /) -> int: ...


class NoBreakers:
    """Every target may be called."""

    def wait_ms(self, target: str, /) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Lease:
    """A backend to call now. ``host`` names the expert host, empty where there is none.
    ``until_moved`` makes the context to await the first of the answer in; it raises
    ``MovedElsewhere`` when another host should be asked instead.
    """

    backend: Backend
    host: str = ""
    until_moved: Callable[[], AbstractContextManager[None]] = nullcontext


class BackendPool:
    """Owns all backends. One HTTP pool per host URL and per remote expert; scripts in process.

    ``secret`` returns the value of an environment variable named by the catalogue. ``wall_ms`` is
    the clock that host records are stamped with.
    """

    def __init__(
        self,
        *,
        directory: Directory | None,
        host_token: Callable[[], str | None],
        secret: Callable[[str], str | None],
        wall_ms: Callable[[], int],
        overrides: Mapping[str, Backend] | None = None,
        breakers: Breakers | None = None,
        limits: PoolLimits | None = None,
    ) -> None:
        self._breakers = NoBreakers() if breakers is None else breakers
        self._limits = limits or PoolLimits()
        self._directory = directory
        self._host_token = host_token
        self._secret = secret
        self._wall_ms = wall_ms
        self._by_host: OrderedDict[str, HttpBackend] = OrderedDict()
        self._by_expert: dict[str, Backend] = dict(overrides or {})
        self._closing: set[asyncio.Task[None]] = set()
        self._waiting = WaitingCalls(lambda expert: self._records(expert, ()), wall_ms)

    def candidate(self, spec: ExpertSpec) -> Candidate:
        """The expert with its live state, for the policy."""
        if wait_ms := self._breakers.wait_ms(expert_target(spec.id)):
            return Candidate(
                spec,
                available=False,
                why_not="its circuit breaker is open after failures",
                retry_after_ms=wait_ms,
            )
        if spec.kind is not SourceKind.WEIGHTS or spec.id in self._by_expert:
            return Candidate(spec)
        record = self._best(spec.id, exclude=())
        if record is None:
            return Candidate(spec, available=False)
        return Candidate(
            spec,
            expected_wait_ms=expected_wait_ms(record, spec.id),
            resident=is_resident(record, spec.id),
        )

    def lease(self, spec: ExpertSpec, *, exclude: Iterable[str] = ()) -> Lease:
        """A backend for the expert, on none of the hosts in ``exclude``.

        Raises:
            HostUnavailable: no other live host serves it.
        """
        if (backend := self._by_expert.get(spec.id)) is not None:
            return Lease(backend)
        if spec.kind is SourceKind.WEIGHTS:
            record = self._best(spec.id, exclude=exclude)
            if record is None or self._directory is None:
                raise HostUnavailable(spec.id)
            self._directory.note_dispatched(record.host_id, spec.id)
            return Lease(
                self._host_backend(record),
                record.host_id,
                lambda: self._waiting.waiting(record.host_id, spec.id),
            )
        backend = self._by_expert[spec.id] = self._own_backend(spec)
        return Lease(backend)

    def move_waiting(self) -> None:
        """Send calls that wait at a busy host to one that has fallen idle; for when hosts were
        listed."""
        self._waiting.look()

    def suspect(self, host: str) -> None:
        """A call to the host broke: leave it out until the registry can tell."""
        if self._directory is not None and host:
            self._directory.mark_suspect(host, self._wall_ms() + SUSPECT_MS)

    async def aclose(self) -> None:
        backends = [*self._by_expert.values(), *self._by_host.values()]
        self._by_expert.clear()
        self._by_host.clear()
        await asyncio.gather(*(backend.aclose() for backend in backends), *self._closing)

    def _best(self, expert: str, exclude: Iterable[str]) -> HostRecord | None:
        return choose_host(self._records(expert, exclude), expert, self._wall_ms())

    def _records(self, expert: str, exclude: Iterable[str]) -> list[HostRecord]:
        """Hosts that may be called for the expert."""
        if self._directory is None:
            return []
        excluded = frozenset(exclude)
        wait_ms = self._breakers.wait_ms
        return [
            r
            for r in self._directory.hosts_for(expert)
            if r.host_id not in excluded and not wait_ms(host_target(r.host_id))
        ]

    def _host_backend(self, record: HostRecord) -> HttpBackend:
        backend = self._by_host.get(record.url)
        if backend is None:
            backend = self._by_host[record.url] = HttpBackend(
                _v1(record.url),
                secret=self._host_token,
                host=record.host_id,
                limits=self._limits,
            )
            self._evict()
        self._by_host.move_to_end(record.url)
        return backend

    def _evict(self) -> None:
        """Hosts come and go with new ports; the least recently used pool is closed."""
        while len(self._by_host) > HOST_BACKENDS_MAX:
            _, backend = self._by_host.popitem(last=False)
            task = asyncio.ensure_future(backend.aclose())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _own_backend(self, spec: ExpertSpec) -> Backend:
        if spec.kind is SourceKind.SCRIPTED:
            return ScriptedBackend(Script.parse(spec.location, spec.options))
        name = spec.secret_env
        return HttpBackend(
            spec.location,
            secret=(lambda: self._secret(name)) if name is not None else None,
            upstream_model=spec.upstream_model,
            limits=self._limits,
        )


def _v1(url: str) -> str:
    stripped = url.rstrip("/")
    return stripped if stripped.endswith("/v1") else f"{stripped}/v1"
