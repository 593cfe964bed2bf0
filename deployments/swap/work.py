"""How much a slot has done for each expert, as totals that only grow. Pure.

Whoever reads two of them some time apart knows the load in between: busy milliseconds per
millisecond is the number of slots that the expert keeps busy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Work", "WorkMeter"]


@dataclass(frozen=True, slots=True)
class Work:
    """``begun``: requests granted. ``busy_ms``: milliseconds of the whole slot; a request that runs
    for a second in one of sixteen places has taken 62.5 of them.
    """

    begun: int = 0
    busy_ms: float = 0.0


class WorkMeter:
    """``places``: requests that the slot runs at once. Times must not go back."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._begun: Counter[str] = Counter()
        self._place_ms: dict[str, float] = {}
        self._running: Counter[str] = Counter()
        self._counted_ms = 0.0

    def begin(self, expert: str, now_ms: float) -> None:
        """A request was granted."""
        self._count_up_to(now_ms)
        self._begun[expert] += 1
        self._running[expert] += 1

    def end(self, expert: str, now_ms: float) -> None:
        """A granted request has left the device."""
        self._count_up_to(now_ms)
        self._running[expert] -= 1
        if self._running[expert] == 0:
            del self._running[expert]

    def totals(self, now_ms: float) -> Mapping[str, Work]:
        """What has been done so far, running requests up to now."""
        self._count_up_to(now_ms)
        return {
            expert: Work(begun, self._place_ms.get(expert, 0.0) / self._places)
            for expert, begun in self._begun.items()
        }

    def _count_up_to(self, now_ms: float) -> None:
        passed_ms = now_ms - self._counted_ms
        for expert, count in self._running.items():
            self._place_ms[expert] = self._place_ms.get(expert, 0.0) + count * passed_ms
        self._counted_ms = now_ms
