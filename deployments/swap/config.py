"""The scheduler's settings, checked once when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

__all__ = ["SchedulerConfig"]

_AT_LEAST_ONE = ("queue_max", "in_flight_max")
_ABOVE_ZERO = (
    "age_bound_ms",
    "drain_deadline_ms",
    "swap_timeout_ms",
    "queue_wait_ms_max",
    "announce_ttl_ms",
    "measure_ttl_ms",
    "close_grace_ms",
    "prefetch_pause_ms",
)


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds and weights of one slot.

    ``queue_max``: requests that may wait, over all experts. ``in_flight_max``: requests the
    resident runs at once. ``age_bound_ms``: a wait that closes admission to another resident.
    ``min_residency_ms``, ``min_residency_factor``: a busy resident stays at least the greater of
    the first and the second times what a turn costs (swap and drain), but never longer than
    ``min_residency_ms_max`` against its will to leave. ``drain_deadline_ms``: how long a drain
    waits before requests that have sent nothing are aborted. ``queue_wait_ms_max``: the longest
    wait; None: age bound, drain deadline and one swap, that is, the swap to a request's expert has
    to begin within the first two, and is waited for as long as it takes. ``announce_weight``,
    ``announce_ttl_ms``: what a look-ahead hint counts, as a share of a waiting request, and for how
    long. ``measure_weight``: share of the newest sample in a moving average; ``measure_ttl_ms``:
    age at which a measurement no longer justifies a refusal. ``close_grace_ms``: how long closing
    waits for a running swap. ``prefetch_pause_ms``: how long after a load from disk that could not
    be done another is tried.
    """

    queue_max: int = 256
    in_flight_max: int = 16
    age_bound_ms: float = 3_000.0
    min_residency_ms: float = 500.0
    min_residency_factor: float = 2.0
    min_residency_ms_max: float = 30_000.0
    drain_deadline_ms: float = 15_000.0
    swap_timeout_ms: float = 120_000.0
    queue_wait_ms_max: float | None = None
    announce_weight: float = 0.5
    announce_ttl_ms: float = 10_000.0
    measure_weight: float = 0.3
    measure_ttl_ms: float = 300_000.0
    close_grace_ms: float = 5_000.0
    prefetch_pause_ms: float = 1_000.0

    def __post_init__(self) -> None:
        for setting in fields(self):
            self._check_range(setting.name)
        if not 0.0 < self.measure_weight <= 1.0:
            raise ValueError(f"measure_weight must be in (0, 1], not {self.measure_weight}")
        if self.min_residency_ms > self.min_residency_ms_max:
            raise ValueError("min_residency_ms must not exceed min_residency_ms_max")

    def _check_range(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:  # only where the type allows it
            return
        if not math.isfinite(value):
            raise ValueError(f"{name} must be finite, not {value}")
        if name in _AT_LEAST_ONE and value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
        if name in _ABOVE_ZERO and value <= 0:
            raise ValueError(f"{name} must be above 0, not {value}")
        if value < 0:
            raise ValueError(f"{name} must not be negative, not {value}")

    @property
    def turn_wait_ms_max(self) -> float:
        """How long a request may wait for its turn, which begins with the swap to its expert;
        infinite where a number bounds the whole wait."""
        if self.queue_wait_ms_max is not None:
            return math.inf
        return self.age_bound_ms + self.drain_deadline_ms

    def residency_ms(self, turn_ms: float) -> float:
        """How long an expert stays, while it has work; ``turn_ms``: its swap and the next drain."""
        earned_ms = max(self.min_residency_ms, self.min_residency_factor * turn_ms)
        return min(self.min_residency_ms_max, earned_ms)
