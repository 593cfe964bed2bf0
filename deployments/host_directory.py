"""A gateway's view of the hosts: a cache of the registry that outlives outages of the store.

Looking a host up never waits for the store. When the store is away the last known hosts stay, and
``stale`` says so; hosts that a gateway itself found dead are avoided for as long as it asks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from deployments.choose_host import is_idle, is_resident
from deployments.host_record import SWAPPING, HostRecord, RegistrySnapshot
from experts.errors import StateUnavailable

log = logging.getLogger(__name__)

SUSPICION_MAX_MS = 60_000.0


class HostSource(Protocol):
    """Where the records come from: ``deployments.registry.HostRegistry``."""

    async def snapshot(self) -> RegistrySnapshot: ...


def merge_snapshot(
    known: Mapping[str, HostRecord], listed: RegistrySnapshot, *, keep_missing: bool
) -> dict[str, HostRecord]:
    """The hosts to believe in after a listing.

    ``keep_missing``: the store is just back, perhaps empty, and hosts may not yet have registered
    again; dropping them would refuse requests that they can serve.
    """
    fresh = {record.host_id: record for record in listed.records}
    return {**known, **fresh} if keep_missing else fresh


def add_dispatched(record: HostRecord, sent: Mapping[str, int]) -> HostRecord:
    """The record as it will be when the host has seen these requests too (expert -> how many).

    A burst between two heartbeats spreads over hosts where its expert is resident, and stays
    together where it is not, for there it is one swap that serves all of it. A slot out of work
    turns at once, so whoever asks for its resident after that finds it gone.
    """
    running = sum(count for expert, count in sent.items() if is_resident(record, expert))
    waiting = Counter(record.queue_depths)
    waiting.update({e: count for e, count in sent.items() if not is_resident(record, e)})
    if waiting.total() and is_idle(record) and not running:
        record = replace(record, resident=None, slot_state=SWAPPING)
    return replace(record, in_flight=record.in_flight + running, queue_depths=dict(waiting))


class HostDirectory:
    """Single owner of one gateway worker's host list.

    ``refresh_ms``: pause between background refreshes. ``min_refresh_ms``: ``refresh`` asks the
    store at most this often. ``grace_ms``: how long after an outage, or after the store lost its
    data, hosts that are not listed are still believed in; longer than a host's heartbeat and the
    store client's longest back-off together. ``wall_ms`` is milliseconds since the epoch,
    ``mono_ms`` a monotonic clock. ``on_listed`` is called after every listing that succeeded.
    """

    def __init__(
        self,
        registry: HostSource,
        *,
        refresh_ms: float = 100,
        min_refresh_ms: float = 50,
        grace_ms: float = 6_000,
        wall_ms: Callable[[], float] = lambda: time.time() * 1000,
        mono_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
    ) -> None:
        self._registry = registry
        self._refresh_ms = refresh_ms
        self._min_refresh_ms = min_refresh_ms
        self._grace_ms = grace_ms
        self._wall_ms = wall_ms
        self._mono_ms = mono_ms
        self._records: dict[str, HostRecord] = {}
        self._suspect_until: dict[str, float] = {}
        self._dispatched: dict[str, Counter[str]] = {}
        self._epoch: int | None = None
        self._stale = True
        self._asked_ms = float("-inf")
        self._listed_ms = float("-inf")
        self._grace_until_ms = float("-inf")
        self._lock = asyncio.Lock()
        self.on_listed: Callable[[], None] = lambda: None
        self._task: asyncio.Task[None] | None = None

    @property
    def stale(self) -> bool:
        """True while the last attempt to list the hosts failed, or none was made."""
        return self._stale

    @property
    def age_ms(self) -> float:
        """Time since the last successful listing; infinite before the first."""
        return self._mono_ms() - self._listed_ms

    @property
    def records(self) -> list[HostRecord]:
        """All known hosts, suspects included, ordered by id."""
        return [self._records[host_id] for host_id in sorted(self._records)]

    def hosts_for(self, expert: str) -> list[HostRecord]:
        """Hosts that serve the expert and are not under suspicion, ordered by id.

        Each record includes what this gateway sent since the host's last heartbeat.
        """
        now_ms = self._mono_ms()
        return [
            self._with_dispatched(record)
            for record in self.records
            if record.serves(expert) and self._suspect_until.get(record.host_id, now_ms) <= now_ms
        ]

    def mark_suspect(self, host_id: str, until_ms: float) -> None:
        """Avoid the host until then (wall clock; a minute at most): its connection broke."""
        wait_ms = min(until_ms - self._wall_ms(), SUSPICION_MAX_MS)
        if host_id in self._records and wait_ms > 0:
            self._suspect_until[host_id] = self._mono_ms() + wait_ms

    def note_dispatched(self, host_id: str, expert: str) -> None:
        """Tell that a request went there; counted until the host's next heartbeat."""
        if host_id in self._records:
            self._dispatched.setdefault(host_id, Counter())[expert] += 1

    async def start(self) -> None:
        """List once, then keep refreshing in the background until ``aclose``."""
        await self.refresh()
        if self._task is None:
            self._task = asyncio.create_task(self._keep_fresh(), name="host-directory")

    async def aclose(self) -> None:
        """Stop refreshing; what is known stays readable."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def refresh(self) -> None:
        """List now, unless that was just done. An outage shows in ``stale``, not as an error."""
        async with self._lock:
            if self._mono_ms() - self._asked_ms < self._min_refresh_ms:
                return
            self._asked_ms = self._mono_ms()
            try:
                listed = await self._registry.snapshot()
            except StateUnavailable:
                self._stale = True
                return
            self._take(listed)
            self.on_listed()

    async def _keep_fresh(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_ms / 1000)
            try:
                await self.refresh()
            except Exception:  # outermost frame of the task; the list must not freeze
                self._stale = True
                log.exception("listing the hosts failed")

    def _take(self, listed: RegistrySnapshot) -> None:
        now_ms = self._mono_ms()
        if self._epoch is not None and (self._stale or listed.epoch != self._epoch):
            self._grace_until_ms = now_ms + self._grace_ms
        self._stale, self._epoch, self._listed_ms = False, listed.epoch, now_ms
        before = self._records
        keep_missing = now_ms < self._grace_until_ms
        self._records = merge_snapshot(before, listed, keep_missing=keep_missing)
        self._forget_outdated(before, now_ms)

    def _forget_outdated(self, before: Mapping[str, HostRecord], now_ms: float) -> None:
        """Keep both side tables no larger than the host list."""
        self._suspect_until = {
            host_id: until
            for host_id, until in self._suspect_until.items()
            if until > now_ms and host_id in self._records
        }
        self._dispatched = {
            host_id: counts
            for host_id, counts in self._dispatched.items()
            if host_id in self._records
            and self._records[host_id].heartbeat_ms == before[host_id].heartbeat_ms
        }

    def _with_dispatched(self, record: HostRecord) -> HostRecord:
        sent = self._dispatched.get(record.host_id)
        return add_dispatched(record, sent) if sent else record
