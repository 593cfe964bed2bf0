"""No swapping: the best fixed placement for the trace's mean rates.

It knows every expert's mean rate over the whole horizon beforehand, which no operator does. A
request goes to the copy of its expert with the fewest requests; one whose expert is not placed is
turned away at once and counts as missed.
"""

from __future__ import annotations

from deployments.simulate.base import Quiet, WaitQueue
from deployments.simulate.floor import Floor, Slot
from deployments.simulate.job import Job
from deployments.simulate.placing import copies_for_demand, slot_capacity_rps
from deployments.simulate.workload import Workload

__all__ = ["Static"]


class Static(Quiet):
    def __init__(self, floor: Floor, workload: Workload) -> None:
        super().__init__(floor)
        seconds = max(workload.horizon_ms, 1.0) / 1e3
        rates = {expert: count / seconds for expert, count in workload.requests_of().items()}
        capacity = slot_capacity_rps(floor.cluster, workload)
        placed = copies_for_demand(rates, len(floor.slots), capacity)
        self._copies: dict[str, list[Slot]] = {}
        for slot, expert in zip(floor.slots, placed, strict=True):
            floor.place(slot, expert)
            self._copies.setdefault(expert, []).append(slot)
        self._queues = {expert: WaitQueue() for expert in self._copies}

    def arrived(self, job: Job) -> None:
        copies = self._copies.get(job.expert)
        if copies is None:
            self.floor.miss(job)
            return
        slot = min(copies, key=lambda copy: len(copy.running))
        if slot.has_room:
            self.floor.start(slot, job)
        else:
            self._queues[job.expert].push(job)

    def finished(self, job: Job) -> None:
        waiting = self._queues[job.expert].head()
        if waiting is not None:
            self.floor.start(self.floor.slots[job.slot], waiting)
