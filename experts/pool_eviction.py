"""Which pool entry to give up when host memory is full: GreedyDual-Size with Frequency. Pure.

Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP
Laboratories 1998, section 3: H = L + frequency * cost / size; the entry of least H goes, and its
H becomes L, the age that newcomers start from. Cost is what it takes to bring the entry back, here
the seconds of loading it from disk, so a cheap and rarely used expert goes before a dear, popular
one, and one that was popular long ago ages out.
"""

from __future__ import annotations

from collections.abc import Iterable


class EvictionScores:
    """Scores by expert. Deterministic: equal scores fall to the one unused for longer."""

    def __init__(self) -> None:
        self._age = 0.0
        self._frequency: dict[str, int] = {}
        self._cost_per_byte: dict[str, float] = {}
        self._score: dict[str, float] = {}

    def loaded(self, expert: str, *, cost_s: float, size_bytes: int) -> None:
        """The expert's weights were brought in from disk."""
        self._cost_per_byte[expert] = cost_s / size_bytes
        self.used(expert)

    def used(self, expert: str) -> None:
        """The expert was made resident."""
        self._frequency[expert] = self._frequency.get(expert, 0) + 1
        # Put back at the end: dicts keep order, and ties go to the first.
        self._score.pop(expert, None)
        self._score[expert] = self._age + self._frequency[expert] * self._cost_per_byte[expert]

    def victim(self, candidates: Iterable[str]) -> str:
        """The candidate of least score. Raises ValueError when there is none."""
        allowed = set(candidates)
        return min((e for e in self._score if e in allowed), key=self._score.__getitem__)

    def evicted(self, expert: str) -> None:
        """Forget the expert; from now on nobody starts below its score."""
        self._age = self._score.pop(expert)
        del self._frequency[expert]
        del self._cost_per_byte[expert]
