"""A planner that knows every future arrival: what swapping could gain from foresight.

It knows the whole trace, arrival times, experts and token counts, and uses of it

- the next use of every expert: an idle slot gives way to the expert needed soonest, before its
  request arrives, if the slot's own resident is needed later (the victim is the one with the
  farthest next use: Belady's rule);
- the true number of requests for either side within the next while, where a busy slot would have
  to drain for a waiting expert.

This is a strong heuristic and no proof: Belady's rule is optimal for paging with one request at a
time, not with batches, queues and drains, and the best schedule is a hard combinatorial problem.
``compare`` therefore reports as clairvoyant the best, by goodput, of this planner and of all other
policies on the same arrivals: knowing the trace, it could have replayed each and picked one.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from deployments.simulate.base import Quiet, WaitQueue
from deployments.simulate.floor import Floor, Slot
from deployments.simulate.job import Job
from deployments.simulate.workload import Workload

__all__ = ["Clairvoyant"]

_REPLAN_MS = 20.0  # drains are weighed at most this often
_STAY_SWAPS = 2.0  # a newcomer with work stays this many swaps' time
_LOOK_SWAPS = 4.0  # how far ahead requests count when a drain is weighed


class Clairvoyant(Quiet):
    def __init__(self, floor: Floor, workload: Workload) -> None:
        super().__init__(floor)
        self._times: dict[str, list[float]] = {expert: [] for expert in floor.experts}
        for arrival in workload.arrivals:
            self._times[arrival.expert].append(arrival.arrived_ms)
        self._seen = dict.fromkeys(floor.experts, 0)
        self._next_ms = {e: times[0] if times else math.inf for e, times in self._times.items()}
        self._queues = {expert: WaitQueue() for expert in floor.experts}
        self._waiting: set[str] = set()
        self._leaving: dict[int, str] = {}  # slots that drain, and for whom
        self._weighed_ms = -math.inf
        swap = floor.cluster.copy_ms + floor.cluster.link.swap_fixed_ms
        self._stay_ms, self._look_ms = _STAY_SWAPS * swap, _LOOK_SWAPS * swap + 1.0
        self._fill_empty()

    def arrived(self, job: Job) -> None:
        expert = job.expert
        self._seen[expert] += 1
        times, seen = self._times[expert], self._seen[expert]
        self._next_ms[expert] = times[seen] if seen < len(times) else math.inf
        self._queues[expert].push(job)
        self._waiting.add(expert)
        self._serve(expert)
        self._plan()

    def finished(self, job: Job) -> None:
        slot = self.floor.slots[job.slot]
        if slot.number not in self._leaving:
            self._serve(job.expert)
        self._plan()

    def swapped(self, slot: Slot) -> None:
        assert slot.resident is not None
        self._serve(slot.resident)
        self._plan()

    def left(self, job: Job) -> None:
        self._plan()

    # --- serving ---------------------------------------------------------------------------------

    def _serve(self, expert: str) -> None:
        queue = self._queues[expert]
        while job := queue.head():
            ready = [
                slot
                for slot in self.floor.slots
                if slot.serves(expert) and slot.number not in self._leaving
            ]
            if not ready:
                return
            self.floor.start(min(ready, key=lambda slot: len(slot.running)), job)
        self._waiting.discard(expert)

    # --- planning --------------------------------------------------------------------------------

    def _plan(self) -> None:
        self._end_drains()
        self._swap_for_waiting()
        self._prefetch()
        if self._waiting and self.floor.now_ms - self._weighed_ms >= _REPLAN_MS:
            self._weighed_ms = self.floor.now_ms
            self._weigh_drain()

    def _end_drains(self) -> None:
        for number, target in list(self._leaving.items()):
            slot = self.floor.slots[number]
            if self._queues[target].head() is None:  # nobody waits for it any more
                del self._leaving[number]
                self._serve(slot.resident or "")
            elif slot.idle:
                del self._leaving[number]
                self.floor.swap(slot, target)

    def _swap_for_waiting(self) -> None:
        """Idle slots to experts that wait: first those without a copy, oldest first."""
        for expert in self._by_age():
            if self._is_coming(expert):
                continue
            has_copy = any(slot.resident == expert for slot in self.floor.slots)
            victim = self._victim()
            if victim is None:
                return
            if not has_copy or self._resident_next_ms(victim) > self.floor.now_ms + self._look_ms:
                self.floor.swap(victim, expert)

    def _prefetch(self) -> None:
        """An idle slot whose resident is needed later than somebody absent changes over now."""
        while (victim := self._victim()) is not None:
            here = {slot.resident for slot in self.floor.slots}
            here |= {slot.target for slot in self.floor.slots}
            absent = (expert for expert in self.floor.experts if expert not in here)
            soonest = min(absent, key=self._next_ms.__getitem__, default=None)
            if soonest is None or self._next_ms[soonest] >= self._resident_next_ms(victim):
                return
            self.floor.swap(victim, soonest)

    def _weigh_drain(self) -> None:
        """One busy slot gives way when more requests gain by it than lose."""
        wanted = [e for e in self._by_age() if not self._is_coming(e) and not self._has_copy(e)]
        if not wanted:
            return
        expert = max(wanted, key=self._gain)
        slot = min(self._may_drain(), key=self._loss, default=None)
        if slot is not None and self._gain(expert) > self._loss(slot):
            self._leaving[slot.number] = expert
            self._end_drains()

    def _gain(self, expert: str) -> float:
        head = self._queues[expert].head()
        waited_ms = self.floor.now_ms - head.arrived_ms if head else 0.0
        waiting = len(self._queues[expert].waiting())
        return (waiting + self._soon(expert)) * (1.0 + waited_ms / self._look_ms)

    def _loss(self, slot: Slot) -> float:
        resident = slot.resident or ""
        others = sum(1 for other in self.floor.slots if other.resident == resident) - 1
        waiting = len(self._queues[resident].waiting())
        return (waiting + self._soon(resident)) / (1.0 + others)

    def _soon(self, expert: str) -> int:
        """Requests that will come within the look-ahead."""
        times = self._times[expert]
        until_ms = self.floor.now_ms + self._look_ms
        return bisect_right(times, until_ms, lo=self._seen[expert]) - self._seen[expert]

    # --- slots -----------------------------------------------------------------------------------

    def _fill_empty(self) -> None:
        """The experts needed first are swapped in before the first request."""
        by_need = sorted(self.floor.experts, key=self._next_ms.__getitem__)
        for slot, expert in zip(self.floor.slots, by_need, strict=False):
            if self._next_ms[expert] < math.inf:
                self.floor.swap(slot, expert)

    def _victim(self) -> Slot | None:
        idle = (s for s in self.floor.slots if s.idle and s.number not in self._leaving)
        return max(idle, key=self._resident_next_ms, default=None)

    def _resident_next_ms(self, slot: Slot) -> float:
        """When the slot's resident is needed next; never, if another copy is there for it."""
        resident = slot.resident
        if resident is None:
            return math.inf
        if any(o is not slot and resident in (o.resident, o.target) for o in self.floor.slots):
            return math.inf
        return self._next_ms[resident]

    def _may_drain(self) -> list[Slot]:
        stayed_ms = self.floor.now_ms - self._stay_ms
        return [
            slot
            for slot in self.floor.slots
            if slot.running and slot.number not in self._leaving and slot.since_ms <= stayed_ms
        ]

    def _has_copy(self, expert: str) -> bool:
        return any(
            slot.resident == expert and slot.number not in self._leaving
            for slot in self.floor.slots
        )

    def _is_coming(self, expert: str) -> bool:
        if expert in self._leaving.values():
            return True
        return any(slot.target == expert for slot in self.floor.slots)

    def _by_age(self) -> list[str]:
        ages = []
        for expert in list(self._waiting):
            head = self._queues[expert].head()
            if head is None:
                self._waiting.discard(expert)
            else:
                ages.append((head.arrived_ms, expert))
        return [expert for _, expert in sorted(ages)]
