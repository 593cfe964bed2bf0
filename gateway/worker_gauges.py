"""Metrics that are read off: store, hosts, residency, breakers, policies, sizes of what is held.

Each worker reads its own every few seconds; the mode of each gauge says how the workers' values
become one. Labels name experts, policies and states, never hosts: a host's id changes with every
start, and a monitor would collect dead ones for ever.
"""

from __future__ import annotations

import asyncio
from collections import Counter as Tally
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import psutil

from deployments.host_record import HostRecord
from gateway.metrics import Metrics
from policies.policy_set import PolicySet

__all__ = ["Sizes", "WorkerGauges", "WorkerView"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a worker holds, and what it has lost since its start."""

    decisions_queued: int = 0
    decisions_dropped: int = 0
    settlements_waiting: int = 0
    settlements_lost: int = 0


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What one worker knows at one moment. ``tripped``: breaker targets, as ``kind:name``."""

    store_up: bool
    hosts_stale: bool
    hosts: Iterable[HostRecord]
    policies: PolicySet
    tripped: Mapping[str, str]
    sizes: Sizes


class WorkerGauges:
    """Sets the gauges from views. ``experts``: the catalogue's ids."""

    def __init__(self, metrics: Metrics, experts: Iterable[str]) -> None:
        self._experts = tuple(experts)
        gauge = metrics.gauge
        self._workers = gauge("coe_workers", "Workers that run", [], "livesum")
        self._memory = gauge(
            "coe_worker_resident_bytes", "Resident memory of the workers", [], "livesum"
        )
        self._store = gauge("coe_store_up", "1: all workers reach the store", [], "livemin")
        self._stale = gauge("coe_hosts_stale", "1: some worker's host list is old", [], "livemax")
        self._hosts = gauge("coe_hosts", "Live hosts by slot state", ["state"], "livemax")
        self._placed = gauge("coe_expert_hosts", "Hosts that serve it", ["expert"], "livemax")
        self._resident = gauge(
            "coe_expert_resident_hosts", "Hosts that hold it ready", ["expert"], "livemax"
        )
        self._retired = gauge(
            "coe_expert_out_of_service_hosts", "Hosts that refuse it", ["expert"], "livemax"
        )
        self._depth = gauge(
            "coe_host_queue_depth", "Requests waiting at hosts", ["expert"], "livemax"
        )
        self._breakers = gauge(
            "coe_breakers_open", "Breakers that are not closed", ["kind"], "livemax"
        )
        self._tripped = gauge(
            "coe_expert_breaker_open",
            "1: the expert's breaker is not closed",
            ["expert"],
            "livemax",
        )
        self._share = gauge(
            "coe_policy_share",
            "Share of sessions that get this version; 0: not in force any more",
            ["policy", "digest"],
            "livemax",
        )
        self._held = gauge("coe_held", "What workers hold for later", ["what"], "livesum")
        self._lost = metrics.counter("coe_lost", "What workers gave up", ["what"])
        self._lost_before = Sizes()
        self._process = psutil.Process()

    def set(self, view: WorkerView) -> None:
        """Bring all gauges up to the view."""
        self._workers().set(1)
        self._memory().set(self._process.memory_info().rss)
        self._store().set(view.store_up)
        self._stale().set(view.hosts_stale)
        self._set_hosts(tuple(view.hosts))
        self._set_breakers(view.tripped)
        self._set_policies(view.policies)
        self._set_sizes(view.sizes)

    def _set_hosts(self, hosts: tuple[HostRecord, ...]) -> None:
        states = Tally(record.slot_state for record in hosts)
        for state in ("empty", "serving", "draining", "swapping"):
            self._hosts(state).set(states[state])
        for expert in self._experts:
            self._placed(expert).set(sum(r.serves(expert) for r in hosts))
            self._resident(expert).set(sum(r.resident == expert for r in hosts))
            self._retired(expert).set(sum(expert in r.out_of_service for r in hosts))
            self._depth(expert).set(sum(r.queue_depths.get(expert, 0) for r in hosts))

    def _set_breakers(self, tripped: Mapping[str, str]) -> None:
        kinds = Tally(target.partition(":")[0] for target in tripped)
        for kind in ("expert", "host"):
            self._breakers(kind).set(kinds[kind])
        for expert in self._experts:
            self._tripped(expert).set(f"expert:{expert}" in tripped)

    def _set_policies(self, policies: PolicySet) -> None:
        now: dict[tuple[str, str], float] = {}
        for name, policy in policies.policies.items():
            canary = policies.canaries.get(name)
            share = 0.0 if canary is None else canary.share
            now[name, policy.digest] = 1.0 - share
            if canary is not None:
                now[name, canary.policy.digest] = share
        for pair in self._share.known() - now.keys():
            self._share(*pair).set(0.0)
        for pair, share in now.items():
            self._share(*pair).set(share)

    def _set_sizes(self, sizes: Sizes) -> None:
        before, self._lost_before = self._lost_before, sizes
        self._held("decisions").set(sizes.decisions_queued)
        self._held("settlements").set(sizes.settlements_waiting)
        self._lost("decisions").inc(sizes.decisions_dropped - before.decisions_dropped)
        self._lost("settlements").inc(sizes.settlements_lost - before.settlements_lost)


class GaugeTask:
    """Keeps the gauges fresh, ``every_s``."""

    def __init__(
        self, gauges: WorkerGauges, look: Callable[[], WorkerView], *, every_s: float = 2.0
    ) -> None:
        self._gauges = gauges
        self._look = look
        self._every_s = every_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._gauges.set(self._look())
        self._task = asyncio.create_task(self._run(), name="worker-gauges")

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            self._gauges.set(self._look())
