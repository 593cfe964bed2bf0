"""llama-swap's order (mostlygeek/llama-swap, internal/router/design.md, scheduler FIFO).

A request whose model is ready is served; one whose model is on its way joins that swap; one that
would evict a busy model waits; otherwise it swaps. After a swap or an answer the queue is gone
through in order and each entry judged again, so that A B C A B C is served A A B B C C. A model
that is always busy is never evicted: there is no ageing.

Which models share an accelerator is configuration there (a group with ``swap: true`` each). We give
it the best an operator can do: experts dealt to slots by mean demand. A model has one copy. What
exceeds the engine's batch waits inside the engine and counts as busy.
"""

from __future__ import annotations

from deployments.simulate.base import Quiet, WaitQueue
from deployments.simulate.floor import Floor, Slot
from deployments.simulate.job import Job
from deployments.simulate.placing import dealt_to_slots
from deployments.simulate.workload import Workload

__all__ = ["LlamaSwap"]


class LlamaSwap(Quiet):
    def __init__(self, floor: Floor, workload: Workload) -> None:
        super().__init__(floor)
        demand = {expert: float(n) for expert, n in workload.requests_of().items()}
        self._group = dealt_to_slots(demand, len(floor.slots))
        self._queues = [WaitQueue() for _ in floor.slots]
        self._inside = [WaitQueue() for _ in floor.slots]

    def arrived(self, job: Job) -> None:
        slot = self.floor.slots[self._group[job.expert]]
        if not self._admit(slot, job):
            self._queues[slot.number].push(job)

    def finished(self, job: Job) -> None:
        slot = self.floor.slots[job.slot]
        waiting = self._inside[slot.number].head()
        if waiting is not None:
            self.floor.start(slot, waiting)
        self._drain_queue(slot)

    def swapped(self, slot: Slot) -> None:
        self._drain_queue(slot)

    def left(self, job: Job) -> None:
        self._drain_queue(self.floor.slots[self._group[job.expert]])

    def _drain_queue(self, slot: Slot) -> None:
        queue = self._queues[slot.number]
        kept = [job for job in queue.waiting() if not self._admit(slot, job)]
        fresh = self._queues[slot.number] = WaitQueue()
        for job in kept:
            fresh.push(job)

    def _admit(self, slot: Slot, job: Job) -> bool:
        """True when the request is out of the queue: it runs, or waits inside the engine."""
        if slot.resident == job.expert:
            if slot.has_room:
                self.floor.start(slot, job)
            else:
                self._inside[slot.number].push(job)
            return True
        if slot.idle and self._inside[slot.number].head() is None:
            self.floor.swap(slot, job.expert)
        return False  # it has begun its own swap, joins one, or waits for a busy model
