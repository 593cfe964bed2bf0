"""What money buys: the price of quality solved for a budget, on recorded outcomes. Pure.

A router takes, for each query, the expert with the largest q - λ·c. Every λ is one point of mean
cost and mean score; so is every expert alone. The frontier is the upper concave hull of them all,
on rows whose scores the estimates have not seen. Between two corners a coin, tossed once per query,
meets any budget exactly in expectation (Dekoninck et al., arXiv 2410.10347, section 3). As the
experts alone are among the points, a router that knows nothing is the mix of two experts, never
less (the zero router of Hu et al., arXiv 2403.12031). So are the prices of the category map, where
it is given: on the rows solved on, the frontier is nowhere below the map (Composition of Experts,
arXiv 2412.01868).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Corner",
    "Mix",
    "best_corner",
    "chosen",
    "mix_for_budget",
    "solve_frontier",
    "upper_hull",
]

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

_PRICES: Final = 48
_PRICE_DECADES: Final = (-2.5, 1.5)


@dataclass(frozen=True, slots=True)
class Corner:
    """One way to route, and what it cost and scored per query on the rows it was solved on.

    ``expert`` None: the largest q - ``price``·c, with the category map's q if ``mapped``.
    Otherwise that column for every query.
    """

    price: float
    expert: int | None
    cost: float
    score: float
    mapped: bool = False


@dataclass(frozen=True, slots=True)
class Mix:
    """``dear`` with probability ``share``, else ``cheap``; one toss per query."""

    cheap: Corner
    dear: Corner
    share: float


def chosen(
    quality: Float64Array, cost: Float64Array, corner: Corner, mapped: Float64Array | None = None
) -> IntArray:
    """[n] columns for estimates [n, k]; of equals, the cheapest.

    ``mapped`` [n, k], the table of the query's category, is needed for a corner of the map.
    """
    if corner.expert is not None:
        return np.full(len(quality), corner.expert, dtype=np.int64)
    if corner.mapped:
        if mapped is None:
            raise ValueError("a corner of the category map needs the map's quality")
        quality = mapped
    value = quality - corner.price * cost
    tied = value >= value.max(axis=1, keepdims=True) - 1e-12
    columns: IntArray = np.where(tied, cost, np.inf).argmin(axis=1).astype(np.int64)
    return columns


def solve_frontier(
    quality: Float64Array,
    cost: Float64Array,
    true_score: Float64Array,
    true_cost: Float64Array,
    mapped: Float64Array | None = None,
) -> tuple[Corner, ...]:
    """Corners by rising cost and score, from estimates and outcomes, each [n, k].

    ``quality`` and ``mapped`` must be out-of-fold: estimates that know the scores would claim too
    much. Which of the two serves a range of budgets is decided by the rows.
    """
    span = float(np.ptp(true_cost.mean(axis=0)))
    unit = 1.0 / span if span > 0 else 0.0
    prices = [0.0, *(unit * 10.0 ** np.linspace(*_PRICE_DECADES, _PRICES))] if unit else [0.0]
    corners = [
        _measured(Corner(float(price), None, 0.0, 0.0), quality, cost, true_score, true_cost)
        for price in prices
    ]
    if mapped is not None:
        corners += [
            _measured(
                Corner(float(price), None, 0.0, 0.0, mapped=True),
                mapped,
                cost,
                true_score,
                true_cost,
            )
            for price in prices
        ]
    corners += [
        Corner(0.0, k, float(true_cost[:, k].mean()), float(true_score[:, k].mean()))
        for k in range(quality.shape[1])
    ]
    points = np.array([(corner.cost, corner.score) for corner in corners])
    return tuple(corners[i] for i in upper_hull(points))


def _measured(
    corner: Corner,
    quality: Float64Array,
    cost: Float64Array,
    true_score: Float64Array,
    true_cost: Float64Array,
) -> Corner:
    rows, columns = np.arange(len(quality)), chosen(quality, cost, corner, quality)
    return replace(
        corner,
        cost=float(true_cost[rows, columns].mean()),
        score=float(true_score[rows, columns].mean()),
    )


def upper_hull(points: Float64Array) -> list[int]:
    """Indices of the upper concave hull of [n, 2] (cost, score), cost rising, score not falling."""
    order = sorted(range(len(points)), key=lambda i: (points[i, 0], -points[i, 1]))
    hull: list[int] = []
    for i in order:
        if hull and points[i, 1] <= points[hull[-1], 1]:
            continue
        while len(hull) > 1 and _turns_up(points[hull[-2]], points[hull[-1]], points[i]):
            hull.pop()
        hull.append(i)
    return hull


def _turns_up(a: Float64Array, b: Float64Array, c: Float64Array) -> bool:
    """Whether ``b`` lies on or below the line from ``a`` to ``c``."""
    return bool((b[0] - a[0]) * (c[1] - a[1]) >= (c[0] - a[0]) * (b[1] - a[1]))


def mix_for_budget(corners: Sequence[Corner], budget: float) -> Mix:
    """The best mix whose expected cost is at most ``budget``; below all corners, the cheapest."""
    dear_at = next((i for i, corner in enumerate(corners) if corner.cost > budget), len(corners))
    if dear_at == len(corners):
        return Mix(corners[-1], corners[-1], 0.0)
    if dear_at == 0:
        return Mix(corners[0], corners[0], 0.0)
    cheap, dear = corners[dear_at - 1], corners[dear_at]
    return Mix(cheap, dear, (budget - cheap.cost) / (dear.cost - cheap.cost))


def best_corner(corners: Sequence[Corner]) -> Corner:
    """The corner with the highest score, whatever it costs."""
    return max(corners, key=lambda corner: corner.score)
