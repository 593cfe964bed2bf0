"""Moving averages that know how old they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Measured"]


@dataclass(slots=True)
class Measured:
    """An exponentially weighted moving average of durations, in milliseconds.

    ``fresh`` forgets a value that nothing has confirmed for ``ttl_ms``. Without that, one slow
    sample could justify refusals that keep any faster sample from ever being taken.
    """

    weight: float
    ttl_ms: float
    value: float | None = None
    at_ms: float = -math.inf

    def observe(self, sample_ms: float, now_ms: float) -> None:
        known = self.fresh(now_ms)
        self.value = sample_ms if known is None else known + self.weight * (sample_ms - known)
        self.at_ms = now_ms

    def fresh(self, now_ms: float) -> float | None:
        return self.value if now_ms - self.at_ms <= self.ttl_ms else None
