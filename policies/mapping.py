"""The category-to-expert map as a mixed-integer program (Composition of Experts, arXiv 2412.01868).

Each category is served by one expert; the map with the highest expected quality that fits a budget
is the answer. Two budgets are of use. *Average cost*: Σ_c w_c Σ_k cost_ck z_ck ≤ B, money or active
parameters per query. It couples the categories, so the best expert of each cannot be taken on its
own. *Held parameters*: Σ_k params_k y_k ≤ B with z_ck ≤ y_k, the memory of every expert in use.
Solved by HiGHS through ``scipy.optimize.milp``. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from experts.errors import ConfigError

__all__ = [
    "CategoryMap",
    "best_map",
    "category_table",
    "map_within_average_cost",
    "map_within_held_parameters",
    "shrunk",
]

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

PSEUDO_COUNTS = 20.0
_GAP = 1e-6


@dataclass(frozen=True, slots=True)
class CategoryMap:
    """``expert`` [c] columns; expected ``quality`` and ``cost`` per query on the tables solved."""

    expert: IntArray
    quality: float
    cost: float


def shrunk(
    means: Float64Array, counts: Float64Array, pseudo_counts: float = PSEUDO_COUNTS
) -> Float64Array:
    """Cell means [c, k] with ``counts`` [c], pulled to each expert's mean over all queries.

    A cell of few queries would otherwise win by luck. Cells with no query hold the expert's mean.
    """
    weights = counts[:, None]
    known = np.where(weights > 0, means, 0.0)
    overall = (weights * known).sum(axis=0) / max(float(counts.sum()), 1.0)
    result: Float64Array = (weights * known + pseudo_counts * overall) / (weights + pseudo_counts)
    return result


def category_table(
    labels: IntArray, outcome: Float64Array, categories: int
) -> tuple[Float64Array, Float64Array]:
    """(means [c, k], rows [c]) of ``outcome`` [n, k] by the category [n] of each row, shrunk."""
    rows = np.bincount(labels, minlength=categories).astype(np.float64)
    sums = np.zeros((categories, outcome.shape[1]))
    np.add.at(sums, labels, outcome)
    return shrunk(sums / np.maximum(rows, 1.0)[:, None], rows), rows


def best_map(quality: Float64Array, cost: Float64Array, weights: Float64Array) -> CategoryMap:
    """Each category's best expert, whatever it costs. Tables [c, k], traffic shares [c]."""
    return _as_map(quality.argmax(axis=1), quality, cost, weights)


def map_within_average_cost(
    quality: Float64Array, cost: Float64Array, weights: Float64Array, budget: float
) -> CategoryMap:
    """The best map whose expected cost per query is at most ``budget``.

    Raises ConfigError when not even the cheapest expert everywhere fits.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    categories, experts = quality.shape
    share = weights / weights.sum()
    cheapest = float(share @ cost.min(axis=1))
    if cheapest > budget:
        raise ConfigError("budget", None, "", f"{budget:g} is below the least cost, {cheapest:g}")
    solved = milp(
        -(share[:, None] * quality).ravel(),
        integrality=np.ones(categories * experts),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(_one_expert_each(categories, experts), 1, 1),
            LinearConstraint((share[:, None] * cost).ravel()[None, :], -np.inf, budget),
        ],
        options={"mip_rel_gap": _GAP},
    )
    table = np.asarray(solved.x).reshape(categories, experts)
    return _as_map(table.argmax(axis=1), quality, cost, weights)


def map_within_held_parameters(
    quality: Float64Array,
    cost: Float64Array,
    weights: Float64Array,
    parameters: Float64Array,
    budget: float,
) -> CategoryMap:
    """The best map over experts whose ``parameters`` [k] add up to at most ``budget``.

    Raises ConfigError when no expert fits alone.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    categories, experts = quality.shape
    if parameters.min() > budget:
        raise ConfigError(
            "budget", None, "", f"{budget:g} holds no expert: the smallest has {parameters.min():g}"
        )
    share = weights / weights.sum()
    cells = categories * experts
    used_if_mapped = np.hstack([np.eye(cells), np.tile(-np.eye(experts), (categories, 1))])
    one_each = np.hstack([_one_expert_each(categories, experts), np.zeros((categories, experts))])
    held = np.concatenate([np.zeros(cells), parameters])
    solved = milp(
        np.concatenate([-(share[:, None] * quality).ravel(), np.zeros(experts)]),
        integrality=np.ones(cells + experts),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(used_if_mapped, -np.inf, 0),
            LinearConstraint(held[None, :], -np.inf, budget),
        ],
        options={"mip_rel_gap": _GAP},
    )
    table = np.asarray(solved.x)[:cells].reshape(categories, experts)
    return _as_map(table.argmax(axis=1), quality, cost, weights)


def _one_expert_each(categories: int, experts: int) -> Float64Array:
    """[c, c·k]: row c sums the cells of category c."""
    cells: Float64Array = np.kron(np.eye(categories), np.ones(experts)).astype(np.float64)
    return cells


def _as_map(
    expert: IntArray, quality: Float64Array, cost: Float64Array, weights: Float64Array
) -> CategoryMap:
    share, rows = weights / weights.sum(), np.arange(len(expert))
    return CategoryMap(
        expert, float(share @ quality[rows, expert]), float(share @ cost[rows, expert])
    )
