"""What an evaluation looks at: held-out outcomes, estimates, and what training knew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policies.frontier import Corner, chosen
from policies.mapping import category_table
from routers.outcomes import Outcomes
from routers.quality_record import Evidence

__all__ = ["Choice", "Known", "Scored", "columns_at", "routed"]

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Known:
    """What the training rows say: ``evidence``, and per category (by name) its row of the tables
    ``quality`` and ``cost`` [c, k] with ``rows`` [c] each; means are shrunk."""

    evidence: Evidence
    categories: Mapping[str, int]
    rows: FloatArray
    quality: FloatArray
    cost: FloatArray

    @classmethod
    def of(cls, evidence: Evidence, categories: tuple[str, ...]) -> Known:
        quality, rows = category_table(evidence.labels, evidence.score, len(categories))
        cost, _ = category_table(evidence.labels, evidence.cost, len(categories))
        names = {name: i for i, name in enumerate(categories)}
        return cls(evidence, names, rows, quality, cost)

    @property
    def best_single(self) -> int:
        return int(self.evidence.score.mean(axis=0).argmax())

    @property
    def cheapest(self) -> int:
        return int(self.evidence.cost.mean(axis=0).argmin())


@dataclass(frozen=True, slots=True)
class Scored:
    """n held-out queries, k experts. ``quality``, ``mapped`` (by the category map alone) and
    ``expected_cost`` [n, k] are the router's, ``category`` [n] its decision; ``corners`` the
    frontier solved on the training evidence."""

    outcomes: Outcomes
    known: Known
    quality: FloatArray
    mapped: FloatArray
    expected_cost: FloatArray
    category: tuple[str, ...]
    corners: tuple[Corner, ...]

    def __len__(self) -> int:
        return len(self.outcomes)


@dataclass(frozen=True, slots=True)
class Choice:
    """What a way of routing got and paid on every query, [n] each; a coin's mean where it has
    one."""

    score: FloatArray
    cost: FloatArray

    @classmethod
    def of(cls, outcomes: Outcomes, columns: IntArray) -> Choice:
        rows = np.arange(len(outcomes))
        return cls(outcomes.score[rows, columns], outcomes.cost[rows, columns])

    def mixed(self, other: Choice, share: float) -> Choice:
        """``other`` with probability ``share``, in expectation."""
        return Choice(
            (1 - share) * self.score + share * other.score,
            (1 - share) * self.cost + share * other.cost,
        )

    def as_json(self) -> dict[str, float]:
        return {"score": float(self.score.mean()), "cost": float(self.cost.mean())}


def routed(scored: Scored, corner: Corner) -> Choice:
    """The held-out queries, routed at one corner of the frontier."""
    return Choice.of(scored.outcomes, columns_at(scored, corner))


def columns_at(scored: Scored, corner: Corner) -> IntArray:
    """[n] columns of the experts that a corner of the frontier sends the held-out queries to."""
    return chosen(scored.quality, scored.expected_cost, corner, scored.mapped)
