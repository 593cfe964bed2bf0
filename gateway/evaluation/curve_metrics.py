"""Cost-quality curves: area, hull, and where a curve reaches a score.

A curve is points (cost, score) by ascending cost. Between two points lies a random mixture of their
settings, so straight lines between points are achievable. Definitions: area as in cascade routing
(Dekoninck et al., 2410.10347, evaluation), AIQ as in RouterBench (Hu et al., 2403.12031, section
3.3), both over the same fixed range of costs for everything compared.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

__all__ = ["area", "cost_to_reach", "upper_hull"]


def upper_hull(cost: FloatArray, score: FloatArray) -> NDArray[np.int64]:
    """Positions of the points on the concave, increasing upper hull, by ascending cost."""
    kept: list[int] = []
    for i in np.lexsort((-score, cost)):
        if kept and score[i] <= score[kept[-1]]:
            continue
        while len(kept) > 1 and _below(kept[-2], kept[-1], i, cost, score):
            kept.pop()
        kept.append(int(i))
    return np.array(kept, dtype=np.int64)


def _below(a: int, b: int, c: int, cost: FloatArray, score: FloatArray) -> bool:
    """Whether b lies on or under the line from a to c."""
    rise, run = score[c] - score[a], cost[c] - cost[a]
    return bool((score[b] - score[a]) * run <= rise * (cost[b] - cost[a]))


def area(cost: FloatArray, score: FloatArray, low: float, high: float) -> float:
    """Mean height over [low, high] by the trapezoid rule.

    Costs ascend. Held flat before the first point and after the last.
    """
    if not high > low:
        return float(np.interp(high, cost, score))
    inside = cost[(cost > low) & (cost < high)]
    grid = np.concatenate([[low], inside, [high]])
    return float(np.trapezoid(np.interp(grid, cost, score), grid) / (high - low))


def cost_to_reach(cost: FloatArray, score: FloatArray, target: float) -> float | None:
    """The least cost at which the curve, run from its left, reaches ``target``; None if never."""
    above = np.flatnonzero(score >= target)
    if not len(above):
        return None
    i = int(above[0])
    if i == 0:
        return float(cost[0])
    part = (target - score[i - 1]) / (score[i] - score[i - 1])
    return float(cost[i - 1] + part * (cost[i] - cost[i - 1]))
