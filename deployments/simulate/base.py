"""What several policies share: doing nothing on an event, and queues that forget who has left."""

from __future__ import annotations

from collections import deque

from deployments.simulate.floor import Floor, Slot
from deployments.simulate.job import Job

__all__ = ["Quiet", "WaitQueue"]


class Quiet:
    """A policy that answers no event; policies override what concerns them."""

    def __init__(self, floor: Floor) -> None:
        self.floor = floor

    def arrived(self, job: Job) -> None:
        del job

    def first_token(self, job: Job) -> None:
        del job

    def finished(self, job: Job) -> None:
        del job

    def swapped(self, slot: Slot) -> None:
        del slot

    def left(self, job: Job) -> None:
        del job

    def woken(self, key: int) -> None:
        del key

    def loaded(self, node: int, expert: str) -> None:
        del node, expert


class WaitQueue:
    """First in, first out; whoever no longer waits is skipped."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()

    def push(self, job: Job) -> None:
        self._jobs.append(job)

    def head(self) -> Job | None:
        while self._jobs and not self._jobs[0].waiting:
            self._jobs.popleft()
        return self._jobs[0] if self._jobs else None

    def pop(self) -> None:
        self._jobs.popleft()

    def waiting(self) -> list[Job]:
        """Who still waits, oldest first; everybody else is forgotten."""
        self._jobs = deque(job for job in self._jobs if job.waiting)
        return list(self._jobs)
