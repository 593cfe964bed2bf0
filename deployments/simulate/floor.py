"""The simulated cluster as a policy sees it, and the rules that no policy can break.

A policy is told what happens and answers by ``start``, ``swap``, ``vacate``, ``stop``, ``miss`` and
``wake``. Anything that the real thing could not do raises ``RuleBroken``: running a request on
another expert's weights, more of them than the engine takes, swapping under a running answer.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from deployments.simulate.cluster import Cluster
from deployments.simulate.engine import EngineModel
from deployments.simulate.job import Job, JobState
from deployments.simulate.memory import NodeMemory
from deployments.simulate.workload import Workload

__all__ = ["Floor", "Policy", "RuleBroken", "Slot", "Tally", "replay"]

_ENGINE, _SWAPPED, _WOKEN, _LOADED = 0, 1, 2, 3
_PROGRESS_EVERY = 500
Event = tuple[float, int, int, int, int]  # time, sequence, kind, slot or key, version


class RuleBroken(RuntimeError):
    """A policy asked for what no cluster can do. A defect of the policy, not of the input."""


@dataclass(slots=True, eq=False)
class Slot:
    """One engine. ``resident`` is None while it is empty or swapping; ``target``: what a running
    swap brings. ``since_ms``: when the resident came. ``used_ms``: when it last started a request.
    """

    number: int
    in_flight_max: int
    resident: str | None = None
    target: str | None = None
    since_ms: float = -math.inf
    used_ms: float = -math.inf
    swap_ms: float = 0.0
    running: dict[str, Job] = field(default_factory=dict)
    version: int = 0

    @property
    def has_room(self) -> bool:
        return len(self.running) < self.in_flight_max

    @property
    def idle(self) -> bool:
        """Nothing runs and no swap is under way: it may swap."""
        return not self.running and self.target is None

    def serves(self, expert: str) -> bool:
        return self.resident == expert and len(self.running) < self.in_flight_max


@dataclass(slots=True)
class Tally:
    """What one replay came to. ``end_ms``: when the last request ended."""

    jobs: list[Job]
    swaps: int
    disk_loads: int
    stops: int
    end_ms: float


class Policy(Protocol):
    """Decides. Told of every event after the floor has taken note of it."""

    def arrived(self, job: Job) -> None: ...

    def first_token(self, job: Job) -> None: ...

    def finished(self, job: Job) -> None:
        """``job.slot`` still names the slot it ran on."""

    def swapped(self, slot: Slot) -> None: ...

    def left(self, job: Job) -> None:
        """Its patience is over; it no longer waits."""

    def woken(self, key: int) -> None: ...

    def loaded(self, node: int, expert: str) -> None:
        """Weights that ``Floor.load`` asked for are in the node's memory."""


class Floor:
    """Single owner of the simulated time and of everything that happens in it.

    ``patience_ms``: how long a request waits before its caller leaves.
    """

    def __init__(self, cluster: Cluster, experts: Sequence[str], patience_ms: float) -> None:
        self.cluster = cluster
        self.experts = tuple(experts)
        self.patience_ms = patience_ms
        self.now_ms = 0.0
        size = cluster.engine.in_flight_max
        self.slots = [Slot(number, size) for number in range(cluster.engines)]
        self._engines = [EngineModel(cluster.engine) for _ in self.slots]
        self._events: list[Event] = []
        self._seq = 0
        self._wakes: dict[int, int] = {}
        self._link_free_ms = [0.0] * cluster.accelerators.count
        self.nodes = cluster.host.count
        self._memory = NodeMemory(cluster, self.experts)
        self._loads: list[tuple[int, str]] = []  # asked for, by number of the event
        self._patience: deque[tuple[float, Job]] = deque()
        self._open = 0
        self._jobs: list[Job] = []
        self.swaps = 0
        self._stops = 0
        self._end_ms = 0.0

    # --- what a policy may do --------------------------------------------------------------------

    def place(self, slot: Slot, expert: str) -> None:
        """Weights that are there before the trace begins; not a swap."""
        if self.now_ms > 0.0 or self._jobs:
            raise RuleBroken("experts are placed before the first request, not later")
        slot.resident, slot.since_ms = expert, -math.inf

    def start(self, slot: Slot, job: Job) -> None:
        """Run a waiting request now."""
        if job.state is not JobState.WAITING:
            raise RuleBroken(f"{job.id} is {job.state.name}, not waiting")
        if slot.resident != job.expert:
            raise RuleBroken(f"{job.id} wants {job.expert}, slot {slot.number} has {slot.resident}")
        if not slot.has_room:
            raise RuleBroken(f"slot {slot.number} is full")
        job.state, job.slot, job.started_ms = JobState.RUNNING, slot.number, self.now_ms
        job.hit, job.starts = slot.since_ms <= job.arrived_ms, job.starts + 1
        slot.running[job.id] = job
        slot.used_ms = self.now_ms
        self._engines[slot.number].add(job, self.now_ms)
        self._reschedule(slot)

    def stop(self, job: Job) -> None:
        """Take back a request that has sent nothing; it waits again, with what patience it has."""
        if job.state is not JobState.RUNNING or job.sent:
            raise RuleBroken(f"{job.id} cannot be stopped")
        slot = self.slots[job.slot]
        self._engines[slot.number].remove_unsent(job, self.now_ms)
        del slot.running[job.id]
        job.state, job.started_ms = JobState.WAITING, math.nan
        self._stops += 1
        expires = (max(self.now_ms, job.arrived_ms + self.patience_ms), job)
        self._patience = deque(sorted([*self._patience, expires], key=lambda entry: entry[0]))
        self._reschedule(slot)

    def swap(self, slot: Slot, expert: str) -> None:
        """Bring an expert's weights into an engine on which nothing runs."""
        if not slot.idle:
            raise RuleBroken(f"slot {slot.number} runs requests or a swap already")
        slot.resident, slot.target = None, expert
        slot.swap_ms = self._swap_ms(slot, expert)
        self.swaps += 1
        self._push(self.now_ms + slot.swap_ms, _SWAPPED, slot.number, 0)

    def vacate(self, slot: Slot) -> None:
        """Forget the resident's weights."""
        if not slot.idle:
            raise RuleBroken(f"slot {slot.number} is not idle")
        slot.resident = None

    def miss(self, job: Job) -> None:
        """A waiting request is turned away for good."""
        if job.state is not JobState.WAITING:
            raise RuleBroken(f"{job.id} is {job.state.name}, not waiting")
        self._end(job, JobState.MISSED)

    def wake(self, key: int, at_ms: float | None) -> None:
        """Call ``woken(key)`` then. Replaces the key's earlier wish; None: not at all."""
        version = self._wakes[key] = self._wakes.get(key, 0) + 1
        if at_ms is not None:
            self._push(max(self.now_ms, at_ms), _WOKEN, key, version)

    def node_of(self, slot: Slot) -> int:
        return self._accelerator(slot) % self.nodes

    def in_memory(self, node: int) -> frozenset[str]:
        """Experts whose weights the node's memory holds."""
        return self._memory.held(node)

    def fill(self, node: int, experts: Sequence[str]) -> None:
        """What the node's memory holds before the trace begins."""
        if self.now_ms > 0.0 or self._jobs or len(experts) > self.cluster.pooled_max:
            raise RuleBroken("memory is filled before the first request, and not beyond its size")
        self._memory.fill(node, experts)

    def load(self, node: int, expert: str, keep: Collection[str] = ()) -> bool:
        """Read an expert from the node's disk ahead of its swap; ``loaded`` tells when it is there.

        False when there is no room beside ``keep``. The least recently used others leave at once.
        """
        ready_ms = self._memory.load(node, expert, keep, self.now_ms)
        if ready_ms is None:
            return False
        self._loads.append((node, expert))
        self._push(ready_ms, _LOADED, len(self._loads) - 1, 0)
        return True

    def drop(self, node: int, expert: str) -> None:
        """Let go of an expert's weights in a node's memory; engines keep what they hold."""
        self._memory.drop(node, expert)

    def swap_estimate_ms(self, slot: Slot, expert: str) -> float:
        """What a swap would take that began now. Reserves nothing."""
        link_ms = self._link_free_ms[self._accelerator(slot)]
        ready_ms = self._memory.ready_ms(self.node_of(slot), expert, self.now_ms)
        copied_ms = max(ready_ms, link_ms) + self.cluster.copy_ms
        return copied_ms + self.cluster.link.swap_fixed_ms - self.now_ms

    # --- running ---------------------------------------------------------------------------------

    def run(
        self, workload: Workload, policy: Policy, progress: Callable[[int], None] | None = None
    ) -> Tally:
        """Replay all arrivals, then what they left behind, until every request has ended."""
        arrivals = iter(_jobs(workload))
        arriving = next(arrivals, None)
        while arriving is not None or self._open:
            if arriving is not None and arriving.arrived_ms <= self._next_ms():
                self._arrive(arriving, policy)
                if progress and len(self._jobs) % _PROGRESS_EVERY == 0:
                    progress(len(self._jobs))
                arriving = next(arrivals, None)
            elif self._patience_ms() <= self._events_ms():
                self._expire(policy)
            else:
                self._happen(policy)
        return Tally(self._jobs, self.swaps, self._memory.disk_loads, self._stops, self._end_ms)

    def _arrive(self, job: Job, policy: Policy) -> None:
        self.now_ms = job.arrived_ms
        self._jobs.append(job)
        self._open += 1
        self._patience.append((self.now_ms + self.patience_ms, job))
        policy.arrived(job)

    def _expire(self, policy: Policy) -> None:
        self.now_ms, job = self._patience.popleft()
        self._end(job, JobState.MISSED)
        policy.left(job)

    def _happen(self, policy: Policy) -> None:
        if not self._events:
            raise RuleBroken(f"{self._open} requests are open and nothing will happen any more")
        self.now_ms, _, kind, number, version = heapq.heappop(self._events)
        if kind == _ENGINE:
            if self.slots[number].version == version:
                self._engine_event(self.slots[number], policy)
        elif kind == _SWAPPED:
            self._swapped(self.slots[number])
            policy.swapped(self.slots[number])
        elif kind == _LOADED:
            node, expert = self._loads[number]
            self._memory.touch(node, expert)
            policy.loaded(node, expert)
        elif self._wakes[number] == version:
            policy.woken(number)

    def _engine_event(self, slot: Slot, policy: Policy) -> None:
        engine = self._engines[slot.number]
        engine.advance(self.now_ms)
        begun = engine.take_prompt_end()
        ended = engine.take_answer_end() if begun is None else None
        self._reschedule(slot, ended=ended)
        if begun is not None:
            begun.first_token_ms = self.now_ms
            policy.first_token(begun)
        if ended is not None:
            self._end(ended, JobState.SERVED)
            policy.finished(ended)

    def _swapped(self, slot: Slot) -> None:
        slot.resident, slot.target = slot.target, None
        slot.since_ms = slot.used_ms = self.now_ms

    def _end(self, job: Job, state: JobState) -> None:
        job.state, job.ended_ms = state, self.now_ms
        self._open -= 1
        self._end_ms = self.now_ms

    # --- time ------------------------------------------------------------------------------------

    def _next_ms(self) -> float:
        return min(self._patience_ms(), self._events_ms())

    def _events_ms(self) -> float:
        return self._events[0][0] if self._events else math.inf

    def _patience_ms(self) -> float:
        while self._patience and not self._patience[0][1].waiting:
            self._patience.popleft()
        return self._patience[0][0] if self._patience else math.inf

    def _push(self, at_ms: float, kind: int, number: int, version: int) -> None:
        self._seq += 1
        heapq.heappush(self._events, (at_ms, self._seq, kind, number, version))

    def _reschedule(self, slot: Slot, *, ended: Job | None = None) -> None:
        """A slot's work has changed: its next event, and its neighbours' share, follow."""
        if ended is not None:
            del slot.running[ended.id]
        neighbours = self.slots[self._accelerator(slot) :: self.cluster.accelerators.count]
        active = sum(1 for other in neighbours if other.running)
        share = 1.0 / max(1, active)
        for other in neighbours:
            engine = self._engines[other.number]
            if other is not slot and engine.share == share:
                continue
            engine.advance(self.now_ms)
            engine.share = share
            other.version += 1
            at_ms = engine.next_event_ms()
            if at_ms < math.inf:
                self._push(at_ms, _ENGINE, other.number, other.version)

    # --- weights ---------------------------------------------------------------------------------

    def _accelerator(self, slot: Slot) -> int:
        return slot.number % self.cluster.accelerators.count

    def _swap_ms(self, slot: Slot, expert: str) -> float:
        """Duration of a swap from now; disk and link serve one expert at a time."""
        duration_ms = self.swap_estimate_ms(slot, expert)
        self._link_free_ms[self._accelerator(slot)] = (
            self.now_ms + duration_ms - self.cluster.link.swap_fixed_ms
        )
        self._memory.fetch(self.node_of(slot), expert, self.now_ms)
        return duration_ms


def replay(
    cluster: Cluster,
    workload: Workload,
    make: Callable[[Floor], Policy],
    *,
    patience_ms: float,
    progress: Callable[[int], None] | None = None,
) -> Tally:
    """One policy over all arrivals, from empty slots unless the policy places experts."""
    floor = Floor(cluster, workload.experts, patience_ms)
    return floor.run(workload, make(floor), progress)


def _jobs(workload: Workload) -> Iterable[Job]:
    for number, arrival in enumerate(workload.arrivals):
        yield Job(
            id=f"r{number}",
            expert=arrival.expert,
            arrived_ms=arrival.arrived_ms,
            input_tokens=arrival.input_tokens,
            output_tokens=arrival.output_tokens,
        )
