"""Ollama's order (ollama/ollama, server/sched.go).

One loop takes pending requests strictly in order and blocks on the head: while its model loads, and
while a victim for it is still answering. A loaded model takes every request at once; what exceeds
its parallel slots waits inside it. The victim is the first idle model in the order of (keep-alive,
name); with none idle, the first in that order, which then finishes what it has. A model that is
idle for the keep-alive (five minutes) is unloaded. A model has one copy.

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
        self._expiring: Slot | None = None  # chosen as the head's victim; takes nothing new

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
        self._take_pending()

    def left(self, job: Job) -> None:
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
            self._make_room(job.expert)
            return False
        if slot.target is not None or slot is self._expiring:
            return False
        if slot.has_room:
            self.floor.start(slot, job)
        else:
            self._inside[slot.number].push(job)
            return True  # handed to its model; it no longer holds up the others
        return True

    def _make_room(self, expert: str) -> None:
        slot = self._expiring or self._empty() or self._victim()
        if self._is_idle(slot):
            self._expiring = None
            self.floor.swap(slot, expert)
        elif slot.target is None:
            self._expiring = slot

    def _slot_of(self, expert: str) -> Slot | None:
        for slot in self.floor.slots:
            if expert in (slot.resident, slot.target):
                return slot
        return None

    def _empty(self) -> Slot | None:
        empty = (s for s in self.floor.slots if s.resident is None and s.target is None)
        return next(empty, None)

    def _victim(self) -> Slot:
        by_name = sorted(self.floor.slots, key=lambda slot: _name_order(slot.resident or ""))
        loaded = [slot for slot in by_name if slot.target is None]
        return next((slot for slot in loaded if self._is_idle(slot)), (loaded or by_name)[0])

    def _is_idle(self, slot: Slot) -> bool:
        return slot.idle and self._inside[slot.number].head() is None


def _name_order(expert: str) -> bytes:
    return hashlib.blake2b(expert.encode(), digest_size=8).digest()
