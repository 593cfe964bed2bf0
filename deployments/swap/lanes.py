"""One expert's lane at the slot: who waits, in which order, and how much that weighs."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from dataclasses import dataclass

from deployments.swap.measures import Measured

__all__ = ["PRIORITY_MAX", "Lane", "Request"]

PRIORITY_MAX = 4
"""Priorities are clamped to -4..4; higher goes first and each step doubles a request's weight."""

_LEVELS = 2 * PRIORITY_MAX + 1
_HINTS_MAX = 64


@dataclass(slots=True, eq=False)
class Request:
    """A request from its arrival to its end. Times are on the caller's clock.

    ``expires_ms``: its patience ends, whatever goes on; it moves on by the time that a request runs
    before it is sent back to the queue. ``turn_by_ms``: this wait ends unless the swap to its
    expert has begun. ``due_ms``: when the queue looks at it next. ``limit_ms``: what a refusal says
    that was allowed. ``aborts`` counts how often a drain has sent it back.
    """

    id: str
    expert: str
    priority: int
    seq: int
    arrived_ms: float
    expires_ms: float
    limit_ms: float
    turn_by_ms: float = math.inf
    due_ms: float = math.inf
    granted_ms: float = math.nan
    sent: bool = False
    aborting: bool = False
    aborts: int = 0

    @property
    def weight(self) -> float:
        return math.ldexp(1.0, self.priority)

    def wait_again(self, now_ms: float, turn_wait_ms_max: float) -> None:
        """It has run in vain since its grant. What was left of its patience has to do; but the wait
        for its turn begins anew: a turn that it had and lost must not make it lose its place too.
        """
        self.expires_ms += now_ms - self.granted_ms
        self.turn_by_ms = now_ms + turn_wait_ms_max


class Lane:
    """Requests of one expert: by arrival, and by priority then arrival. Every operation but
    ``push_back`` is O(1) in the number of requests.

    The demand of a lane is the sum over its requests of weight * (1 + age / age bound). It is
    linear in time, so two running sums are enough to know it at any instant.
    """

    __slots__ = (
        "_arrivals",
        "_hints",
        "_levels",
        "_weight",
        "_weighted_arrival",
        "count",
        "expert",
        "head_ms",
        "out_of_service",
        "swap",
    )

    def __init__(self, expert: str, swap: Measured) -> None:
        self.expert = expert
        self.swap = swap
        self.out_of_service: str | None = None
        # Attributes, not properties: loops over every lane read them at every decision.
        self.count = 0
        self.head_ms = math.inf  # arrival of the oldest request waiting
        # OrderedDict, not dict: taking the first key of a dict slows down as its front is deleted.
        self._arrivals: OrderedDict[str, Request] = OrderedDict()
        self._levels: list[OrderedDict[str, Request]] = [OrderedDict() for _ in range(_LEVELS)]
        self._weight = 0.0
        self._weighted_arrival = 0.0
        self._hints: deque[float] = deque(maxlen=_HINTS_MAX)

    def __len__(self) -> int:
        return self.count

    def requests(self) -> list[Request]:
        return list(self._arrivals.values())

    def push(self, request: Request) -> None:
        """Join at the end of the request's own priority level."""
        self._arrivals[request.id] = request
        self._levels[request.priority + PRIORITY_MAX][request.id] = request
        self._weigh(request, 1.0)

    def push_back(self, request: Request) -> None:
        """Rejoin at the place that the request's arrival gives it. O(n log n); rare."""
        self.push(request)
        for level in (self._arrivals, self._levels[request.priority + PRIORITY_MAX]):
            ordered = sorted(level.values(), key=lambda waiting: waiting.seq)
            level.clear()
            level.update((waiting.id, waiting) for waiting in ordered)
        self._note_head()

    def remove(self, request: Request) -> None:
        del self._arrivals[request.id]
        del self._levels[request.priority + PRIORITY_MAX][request.id]
        self._weigh(request, -1.0)

    def first(self, now_ms: float, age_bound_ms: float) -> Request:
        """Who is next: the oldest once it has aged, else the oldest of the highest priority."""
        if self.head_ms + age_bound_ms <= now_ms:
            return next(iter(self._arrivals.values()))
        level = next(level for level in reversed(self._levels) if level)
        return next(iter(level.values()))

    def ahead_of(self, priority: int) -> int:
        """How many a new request of this priority would find before it."""
        return sum(map(len, self._levels[priority + PRIORITY_MAX :]))

    def demand(self, now_ms: float, age_bound_ms: float) -> float:
        """Waiting work in requests, weighted by priority and age; hints are not in it."""
        return self._weight + (self._weight * now_ms - self._weighted_arrival) / age_bound_ms

    def demand_per_ms(self, age_bound_ms: float) -> float:
        """How fast the demand grows while nobody comes or goes."""
        return self._weight / age_bound_ms

    def add_hint(self, until_ms: float) -> None:
        self._hints.append(until_ms)

    def use_hint(self) -> None:
        """An announced request has come, or nobody can tell it from one that was."""
        if self._hints:
            self._hints.popleft()

    def hints(self, now_ms: float) -> int:
        while self._hints and self._hints[0] <= now_ms:
            self._hints.popleft()
        return len(self._hints)

    def _weigh(self, request: Request, sign: float) -> None:
        self.count = len(self._arrivals)
        if self.count:
            self._weight += sign * request.weight
            self._weighted_arrival += sign * request.weight * request.arrived_ms
        else:  # start afresh, so that rounding never accumulates
            self._weight = self._weighted_arrival = 0.0
        self._note_head()

    def _note_head(self) -> None:
        first = next(iter(self._arrivals.values()), None)
        self.head_ms = math.inf if first is None else first.arrived_ms
