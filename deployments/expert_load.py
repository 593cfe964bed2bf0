"""How many slots each expert keeps busy, as hosts' records tell it over time. Pure.

Hosts report milliseconds of their slots as totals since their start. What is added between two
records counts when it is seen, and fades with a half-life, so the sum is an exponentially weighted
rate: W(t) = sum of added_i x 2^-((t - t_i) / h), and under a steady load W = load x h / ln 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from deployments.host_record import HostRecord

__all__ = ["ExpertLoads"]

_LEAST_MS = 1e-3  # of a slot; what has faded below it is forgotten


class ExpertLoads:
    """``half_life_ms``: how long ago work counts half. Times must not go back."""

    def __init__(self, half_life_ms: float) -> None:
        self._half_life_ms = half_life_ms
        self._totals: dict[str, Mapping[str, tuple[int, int]]] = {}  # by host, as last seen
        self._faded_ms: dict[str, float] = {}  # by expert
        self._now_ms = -math.inf

    def observe(self, records: Iterable[HostRecord], now_ms: float) -> None:
        """Take in what is known now. A host seen for the first time only sets where to count from;
        one that is not listed any more is forgotten.
        """
        self._fade(now_ms)
        totals = {record.host_id: record.work for record in records}
        for host_id, work in totals.items():
            before = self._totals.get(host_id)
            for expert, (_, busy_ms) in work.items() if before is not None else ():
                added_ms = busy_ms - before.get(expert, (0, 0))[1] if before is not None else 0
                if added_ms > 0:
                    self._faded_ms[expert] = self._faded_ms.get(expert, 0.0) + added_ms
        self._totals = totals

    def load(self, expert: str) -> float:
        """Slots kept busy, as of the last ``observe``."""
        return self._faded_ms.get(expert, 0.0) * math.log(2.0) / self._half_life_ms

    def _fade(self, now_ms: float) -> None:
        left = 0.5 ** ((now_ms - self._now_ms) / self._half_life_ms)
        self._now_ms = now_ms
        self._faded_ms = {
            expert: faded_ms
            for expert, ms in self._faded_ms.items()
            if (faded_ms := ms * left) > _LEAST_MS
        }
