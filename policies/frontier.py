"""What money buys: the price of quality solved for a budget, on recorded outcomes. Pure.

A router takes, for each query, the expert with the largest q - λ·c. Every λ is one point of mean
cost and mean score, measured on rows whose scores the estimates have not seen. Between two of these
corners a coin, tossed once per query, meets any budget exactly in expectation (Dekoninck et al.,
arXiv 2410.10347, section 3). Three ways to route compete as a whole, over all prices: the
estimates, the category map (Composition of Experts, arXiv 2412.01868), where it is given, and the
mix of single experts (the zero router of Hu et al., arXiv 2403.12031). A hull over the points of
all of them would look better on the rows it is drawn on, and be worse on others: at each budget it
takes the luckiest of a hundred noisy means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
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
    """Corners by rising cost, from estimates and outcomes, each [n, k]; the last scores best.

    ``quality`` and ``mapped`` must be out-of-fold: estimates that know the scores would claim too
    much. One way to route serves all budgets: the estimates, which weigh the map's table among
    other things, unless the map beats them by more than one standard error, and either of them
    unless the single experts do, in mean value (score - price·cost) / (1 + price·span) over rows
    and prices. It ends where its score is highest, or at the best single expert if no point of it
    scores more.
    """
    n, k = true_score.shape
    singles = [
        Corner(0.0, j, float(true_cost[:, j].mean()), float(true_score[:, j].mean()))
        for j in range(k)
    ]
    hull = [singles[i] for i in upper_hull(np.array([(c.cost, c.score) for c in singles]))]
    prices = _prices(true_cost, hull)
    ways = [
        [Corner(p, None, 0.0, 0.0, is_map) for p in prices]
        for estimate, is_map in ((quality, False), (mapped, True))
        if estimate is not None
    ]
    alone = [max(hull, key=lambda corner: corner.score - p * corner.cost) for p in prices]

    def value(way: Sequence[Corner]) -> Float64Array:
        """[n] mean over prices."""
        total, rows = np.zeros(n), np.arange(n)
        span = float(np.ptp(true_cost.mean(axis=0)))
        for corner, price in zip(way, prices, strict=True):
            columns = chosen(quality, cost, corner, mapped)
            earned = true_score[rows, columns] - price * true_cost[rows, columns]
            total += earned / (1 + price * span)
        mean: Float64Array = total / len(prices)
        return mean

    earned = [value(way) for way in (*ways, alone)]
    taken = 0
    for rival in range(1, len(earned)):
        if _proved(earned[rival] - earned[taken]):
            taken = rival
    if taken == len(ways):
        return tuple(hull)
    measured = [_measured(c, quality, cost, true_score, true_cost, mapped) for c in ways[taken]]
    return _rising(measured, best_corner(singles))


def _proved(lead: Float64Array) -> bool:
    """Whether the mean of [n] is above 0 by more than its standard error."""
    return bool(lead.mean() > lead.std() / np.sqrt(len(lead)))


def _prices(cost: Float64Array, hull: Sequence[Corner]) -> list[float]:
    """0, a geometric grid, and for each single expert on the hull a price at which it is best."""
    span = float(np.ptp(cost.mean(axis=0)))
    if not span > 0:
        return [0.0]
    slopes = [(b.score - a.score) / (b.cost - a.cost) for a, b in pairwise(hull)]
    between = [float(np.sqrt(a * b)) for a, b in pairwise(slopes)]
    grid = 10.0 ** np.linspace(*_PRICE_DECADES, _PRICES) / span
    return [0.0, *sorted([*map(float, grid), *between])]


def _rising(way: Sequence[Corner], single: Corner) -> tuple[Corner, ...]:
    """By cost, each cost once, up to the best score; ``single`` ends it unless that score is
    higher."""
    by_cost = {corner.cost: corner for corner in sorted(way, key=lambda c: (c.cost, c.score))}
    corners = list(by_cost.values())
    top = best_corner(corners)
    if single.score >= top.score:
        return (*(corner for corner in corners if corner.cost < single.cost), single)
    return tuple(corner for corner in corners if corner.cost <= top.cost)


def _measured(
    corner: Corner,
    quality: Float64Array,
    cost: Float64Array,
    true_score: Float64Array,
    true_cost: Float64Array,
    mapped: Float64Array | None,
) -> Corner:
    rows, columns = np.arange(len(quality)), chosen(quality, cost, corner, mapped)
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
