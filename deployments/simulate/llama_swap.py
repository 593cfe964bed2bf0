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
        # One queue per model of a group; together, in order of arrival, they are its one queue.
        self._queues: list[dict[str, WaitQueue]] = [{} for _ in floor.slots]
        for expert, number in self._group.items():
            self._queues[number][expert] = WaitQueue()

    def arrived(self, job: Job) -> None:
        slot = self.floor.slots[self._group[job.expert]]
        self._queues[slot.number][job.expert].push(job)
        self._judge(slot)

    def finished(self, job: Job) -> None:
        self._judge(self.floor.slots[job.slot])

    def swapped(self, slot: Slot) -> None:
        self._judge(slot)

    def left(self, job: Job) -> None:
        self._judge(self.floor.slots[self._group[job.expert]])

    def _judge(self, slot: Slot) -> None:
        """Go through the group's queue: serve what is ready, else swap for the oldest."""
        queues = self._queues[slot.number]
        if slot.resident is not None:
            ready = queues[slot.resident]
            while slot.has_room and (job := ready.head()):
                self.floor.start(slot, job)
        if slot.idle:
            heads = [head for queue in queues.values() if (head := queue.head())]
            if heads:
                oldest = min(heads, key=lambda head: (head.arrived_ms, int(head.id[1:])))
                self.floor.swap(slot, oldest.expert)
