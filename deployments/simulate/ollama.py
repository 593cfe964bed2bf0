"""Ollama's order (ollama/ollama, server/sched.go).

One loop takes pending requests strictly in order. The head that causes a load waits beside the
loop; the loop blocks on a head whose model is loading for another, and on one whose victim is still
answering. A loaded model takes every request at once; what exceeds its parallel slots waits inside
it. The victim is the first idle model in the order of (keep-alive, name); with none idle, the first
in that order, which then finishes what it has. A model that is idle for the keep-alive (five
minutes) is unloaded. A model has one copy.

All keep-alives are equal, so names decide, and a name says nothing about demand: the order is that
of a digest of the name.
"""

from __future__ import annotations

import hashlib

from deployments.simulate.base import Quiet, WaitQueue
from deployments.simulate.floor import Floor, Slot
from deployments.simulate.job import Job

__all__ = ["KEEP_ALIVE_MS", "Ollama"]

KEEP_ALIVE_MS = 300_000.0


class Ollama(Quiet):
    def __init__(self, floor: Floor, keep_alive_ms: float = KEEP_ALIVE_MS) -> None:
        super().__init__(floor)
        self._keep_alive_ms = keep_alive_ms
        self._pending = WaitQueue()
        self._inside = [WaitQueue() for _ in floor.slots]
        self._seats: dict[int, Job] = {}  # who caused the load that runs in this slot
        self._expiring: Slot | None = None  # the victim that the head waits for

    def arrived(self, job: Job) -> None:
        self._pending.push(job)
        self._take_pending()

    def finished(self, job: Job) -> None:
        slot = self.floor.slots[job.slot]
        inside = self._inside[slot.number]
        if waiting := inside.head():
            self.floor.start(slot, waiting)
        if self._is_idle(slot):
            self.floor.wake(slot.number, self.floor.now_ms + self._keep_alive_ms)
        self._take_pending()

    def swapped(self, slot: Slot) -> None:
        job = self._seats.pop(slot.number)
        if job.waiting:
            self.floor.start(slot, job)
        self._take_pending()

    def left(self, job: Job) -> None:
        self._expiring = None  # the next head chooses anew
        self._take_pending()

    def woken(self, key: int) -> None:
        slot = self.floor.slots[key]
        since_ms = self.floor.now_ms - slot.used_ms
        if self._is_idle(slot) and since_ms >= self._keep_alive_ms:
            self.floor.vacate(slot)
            self._take_pending()

    def _take_pending(self) -> None:
        while (job := self._pending.head()) and self._take(job):
            self._pending.pop()

    def _take(self, job: Job) -> bool:
        """True when the head is out of the way; False: the whole queue waits for it."""
        slot = self._slot_of(job.expert)
        if slot is None:
            return self._load(job)
        if slot.target is not None or slot is self._expiring:
            return False
        if slot.has_room:
            self.floor.start(slot, job)
        else:
            self._inside[slot.number].push(job)
        return True

    def _load(self, job: Job) -> bool:
        """Begin to load the head's model, if a slot is to be had now; the load is its own."""
        slot = self._expiring or self._empty() or self._victim()
        if slot is None:
            return False
        if not self._is_idle(slot):
            self._expiring = slot
            return False
        self._expiring = None
        self._seats[slot.number] = job
        self.floor.swap(slot, job.expert)
        return True

    def _slot_of(self, expert: str) -> Slot | None:
        for slot in self.floor.slots:
            if expert in (slot.resident, slot.target):
                return slot
        return None

    def _empty(self) -> Slot | None:
        empty = (s for s in self.floor.slots if s.resident is None and s.target is None)
        return next(empty, None)

    def _victim(self) -> Slot | None:
        """None while every slot is loading."""
        loaded = [slot for slot in self.floor.slots if slot.target is None]
        loaded.sort(key=lambda slot: _name_order(slot.resident or ""))
        idle = next((slot for slot in loaded if self._is_idle(slot)), None)
        return idle or next(iter(loaded), None)

    def _is_idle(self, slot: Slot) -> bool:
        return slot.idle and self._inside[slot.number].head() is None


def _name_order(expert: str) -> bytes:
    return hashlib.blake2b(expert.encode(), digest_size=8).digest()
