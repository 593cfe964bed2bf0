"""First come, first served, with least-recently-used residency: what Samba-CoE's runtime does.

Requests are dispatched strictly in order of arrival. A request whose expert is resident somewhere
with room starts there; one whose expert is on its way takes a seat in that swap; otherwise the idle
slot that was used least recently swaps, also when copies of the expert exist but are full. The
queue stops only at a head for which no slot is idle. Swaps of several slots run side by side.
"""

from __future__ import annotations

from deployments.simulate.base import Quiet, WaitQueue
from deployments.simulate.floor import Floor, Slot
from deployments.simulate.job import Job

__all__ = ["FcfsLru"]


class FcfsLru(Quiet):
    def __init__(self, floor: Floor) -> None:
        super().__init__(floor)
        self._queue = WaitQueue()
        self._seats: dict[int, list[Job]] = {slot.number: [] for slot in floor.slots}

    def arrived(self, job: Job) -> None:
        self._queue.push(job)
        self._dispatch()

    def finished(self, job: Job) -> None:
        self._dispatch()

    def left(self, job: Job) -> None:
        self._dispatch()

    def swapped(self, slot: Slot) -> None:
        seated, self._seats[slot.number] = self._seats[slot.number], []
        for job in seated:
            if job.waiting:
                self.floor.start(slot, job)
        self._dispatch()

    def _dispatch(self) -> None:
        while (job := self._queue.head()) and self._place(job):
            self._queue.pop()

    def _place(self, job: Job) -> bool:
        if ready := [slot for slot in self.floor.slots if slot.serves(job.expert)]:
            self.floor.start(min(ready, key=lambda slot: len(slot.running)), job)
            return True
        for slot in self.floor.slots:
            seats = self._seats[slot.number]
            if slot.target == job.expert and len(seats) < slot.in_flight_max:
                seats.append(job)
                return True
        return self._begin_swap(job)

    def _begin_swap(self, job: Job) -> bool:
        victim = min(
            (slot for slot in self.floor.slots if slot.idle),
            key=lambda slot: (slot.used_ms, slot.number),
            default=None,
        )
        if victim is None:
            return False
        self._seats[victim.number].append(job)
        self.floor.swap(victim, job.expert)
        return True
