"""Every figure of an evaluation, from held-out queries and a frontier solved on training rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gateway.evaluation.baselines import baselines, category_columns, map_at_budget
from gateway.evaluation.calibration import calibration
from gateway.evaluation.curve_metrics import area, cost_to_reach, upper_hull
from gateway.evaluation.intervals import Interval, resampled, resampled_mean, resampled_rows
from gateway.evaluation.pair_metrics import (
    GAP_MIN,
    apgr,
    call_performance_threshold,
    gap_recovered,
)
from gateway.evaluation.scored import Choice, Scored, routed
from policies.frontier import best_corner, mix_for_budget

__all__ = [
    "apgr_gain",
    "at_budget",
    "auc_gain",
    "domain_preference",
    "measure",
    "preference",
    "router_area",
    "router_figures",
]

FloatArray = NDArray[np.float64]


def measure(scored: Scored, budgets: Sequence[float], seed: int) -> dict[str, Any]:
    """Baselines, curve, budgets, calibration and intervals; see docs/evaluation.md."""
    base = baselines(scored)
    single = base["best_single"]
    assert single is not None
    corners = [routed(scored, corner) for corner in scored.corners]
    best = routed(scored, best_corner(scored.corners))
    return {
        "n": len(scored),
        "baselines": {
            name: None if choice is None else choice.as_json() for name, choice in base.items()
        },
        "zero_router": {"auc": area(*_singles_hull(scored), *_cost_range(scored))},
        "router": router_figures(scored, seed),
        "at_budget": {f"{budget:g}": at_budget(scored, corners, budget) for budget in budgets},
        "calibration": calibration(scored.outcomes.experts, scored.quality, scored.outcomes.score),
        "ci95": _intervals(scored, base, single, corners, best, seed)
        | {
            name: interval
            for budget in budgets
            for name, interval in _budget_intervals(scored, single, corners, budget, seed).items()
        },
    }


def router_figures(scored: Scored, seed: int) -> dict[str, Any]:
    """``result["router"]``: the curve, its areas and best point; of two experts, APGR and CPT."""
    corners = [routed(scored, corner) for corner in scored.corners]
    best = routed(scored, best_corner(scored.corners))
    pair = _pair_figures(scored, seed) if _is_pair(scored) else {}
    return {**_curve_figures(scored, corners, best), **pair}


def _curve_figures(scored: Scored, corners: Sequence[Choice], best: Choice) -> dict[str, Any]:
    cost, score = _points(corners)
    low, high = _cost_range(scored)
    hull = upper_hull(cost, score)
    single = scored.outcomes.score[:, scored.known.best_single].mean()
    return {
        "curve": [{"cost": float(c), "score": float(s)} for c, s in zip(cost, score, strict=True)],
        "auc": area(cost, score, low, high),
        "aiq": area(cost[hull], score[hull], low, high),
        "best_score": float(best.score.mean()),
        "best_score_cost": float(best.cost.mean()),
        "cost_at_best_single_score": cost_to_reach(cost, score, float(single)),
    }


def _points(
    choices: Sequence[Choice], weights: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Mean cost and score of each, by rising cost."""
    cost = np.array([np.average(choice.cost, weights=weights) for choice in choices])
    score = np.array([np.average(choice.score, weights=weights) for choice in choices])
    order = np.argsort(cost, kind="stable")
    return cost[order], score[order]


def _cost_range(scored: Scored, weights: FloatArray | None = None) -> tuple[float, float]:
    """Mean cost of the cheapest and of the dearest single expert on these queries."""
    means = np.average(scored.outcomes.cost, axis=0, weights=weights)
    return float(means.min()), float(means.max())


def _singles_hull(
    scored: Scored, weights: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """The zero router, in its own favour: the hull of the singles on the held-out queries."""
    cost = np.average(scored.outcomes.cost, axis=0, weights=weights)
    score = np.average(scored.outcomes.score, axis=0, weights=weights)
    hull = upper_hull(cost, score)
    return cost[hull], score[hull]


def at_budget(scored: Scored, corners: Sequence[Choice], budget: float) -> dict[str, Any]:
    """Router, zero router and category map at a mean cost per query."""
    cost, score = _singles_hull(scored)
    mapped = map_at_budget(scored, budget)
    return {
        "router": _within(scored, corners, budget).as_json(),
        "zero_router": {
            "score": float(np.interp(budget, cost, score)),
            "cost": float(np.clip(budget, cost[0], cost[-1])),
        },
        "map": None if mapped is None else mapped.as_json(),
    }


def _within(scored: Scored, corners: Sequence[Choice], budget: float) -> Choice:
    """The router at a mean cost per query, as training rows solve it."""
    mix = mix_for_budget(scored.corners, budget)
    cheap = corners[scored.corners.index(mix.cheap)]
    return cheap.mixed(corners[scored.corners.index(mix.dear)], mix.share)


# --- two experts ----------------------------------------------------------------------------------


def _is_pair(scored: Scored) -> bool:
    return len(scored.outcomes.experts) == 2


def _pair(scored: Scored) -> tuple[int, int]:
    """Columns of the strong and the weak expert: the better of the two on training rows first."""
    strong = scored.known.best_single
    return strong, 1 - strong


def _has_gap(scored: Scored) -> bool:
    """Whether the two experts of a pair differ in score on these queries."""
    return abs(float(preference(scored)[1].sum())) >= GAP_MIN


def preference(scored: Scored) -> tuple[FloatArray, FloatArray]:
    """Of two experts: how much better the strong one is expected to do, and does, per query."""
    strong, weak = _pair(scored)
    score = scored.outcomes.score
    return (
        scored.quality[:, strong] - scored.quality[:, weak],
        score[:, strong] - score[:, weak],
    )


def domain_preference(scored: Scored) -> FloatArray | None:
    """Of two experts: the training rows' mean gap of each query's true category."""
    strong, weak = _pair(scored)
    gaps = scored.known.quality[:, strong] - scored.known.quality[:, weak]
    rows = category_columns(scored, np.arange(len(gaps)))
    return None if rows is None else gaps[rows % len(gaps)]


def _pair_figures(scored: Scored, seed: int) -> dict[str, Any]:
    """None where there is no gap to recover."""
    if not _has_gap(scored):
        return dict.fromkeys(("apgr", "cpt50", "cpt80", "domain_map_apgr"))
    ours, gain = preference(scored)
    recovered = gap_recovered(ours, gain, seed)
    domain = domain_preference(scored)
    return {
        "apgr": apgr(recovered),
        "cpt50": call_performance_threshold(recovered, 0.5),
        "cpt80": call_performance_threshold(recovered, 0.8),
        "domain_map_apgr": None if domain is None else apgr(gap_recovered(domain, gain, seed)),
    }


# --- intervals ------------------------------------------------------------------------------------


def _intervals(
    scored: Scored,
    base: Mapping[str, Choice | None],
    single: Choice,
    corners: Sequence[Choice],
    best: Choice,
    seed: int,
) -> dict[str, Interval]:
    """Differences from best_single, and of best scores, areas and APGR."""
    found = {
        name: resampled_mean(choice.score - single.score, seed)
        for name, choice in {**base, "router_best_score": best}.items()
        if choice is not None and name != "best_single"
    }
    if (mapped := base["domain_map"]) is not None:
        found["router_best_score_minus_domain_map"] = resampled_mean(
            best.score - mapped.score, seed
        )
    found["router_auc_minus_zero_router"] = resampled(
        lambda weights: auc_gain(scored, corners, weights), len(scored), seed
    )
    domain = domain_preference(scored) if _is_pair(scored) else None
    if domain is not None and _has_gap(scored):
        found["apgr_minus_domain_map"] = resampled_rows(
            lambda rows: apgr_gain(scored, domain, rows, seed), len(scored), seed
        )
    return found


def _budget_intervals(
    scored: Scored, single: Choice, corners: Sequence[Choice], budget: float, seed: int
) -> dict[str, Interval]:
    """What ``at_budget`` scores less best_single, and the router less the rest.

    The zero router is given the cost that the router really has on these queries, which can be
    above or below the budget: the budget is met on training rows.
    """
    at = f"at_{budget:g}"
    router, mapped = _within(scored, corners, budget), map_at_budget(scored, budget)

    def zero(cost: float, weights: FloatArray) -> float:
        return float(np.interp(cost, *_singles_hull(scored, weights)))

    def zero_gain(weights: FloatArray) -> float:
        return zero(budget, weights) - float(np.average(single.score, weights=weights))

    def over_zero(weights: FloatArray) -> float:
        score, cost = (float(np.average(v, weights=weights)) for v in (router.score, router.cost))
        return score - zero(cost, weights)

    found = {
        f"router_{at}": resampled_mean(router.score - single.score, seed),
        f"zero_router_{at}": resampled(zero_gain, len(scored), seed),
        f"router_{at}_minus_zero_router": resampled(over_zero, len(scored), seed),
    }
    if mapped is not None:
        found[f"map_{at}"] = resampled_mean(mapped.score - single.score, seed)
        found[f"router_{at}_minus_map"] = resampled_mean(router.score - mapped.score, seed)
    return found


def router_area(scored: Scored, corners: Sequence[Choice], weights: FloatArray) -> float:
    """Area under the router's curve, queries weighted [n]."""
    return area(*_points(corners, weights), *_cost_range(scored, weights))


def auc_gain(scored: Scored, corners: Sequence[Choice], weights: FloatArray) -> float:
    """Area of the router less the zero router's, queries weighted [n]."""
    zero = area(*_singles_hull(scored, weights), *_cost_range(scored, weights))
    return router_area(scored, corners, weights) - zero


def apgr_gain(scored: Scored, rival: FloatArray, rows: NDArray[np.int64], seed: int) -> float:
    """APGR of the router less that of another order ``rival`` [n] of preference, on ``rows``."""
    ours, gain = preference(scored)
    recovered = gap_recovered(ours[rows], gain[rows], seed)
    return apgr(recovered) - apgr(gap_recovered(rival[rows], gain[rows], seed))
