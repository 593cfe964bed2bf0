"""Metrics of two-expert sets, as RouteLLM defines them (arXiv 2406.18665, section 4)."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from gateway.evaluation.curve_metrics import area, cost_to_reach

__all__ = [
    "GAP_MIN",
    "apgr",
    "call_performance_threshold",
    "gap_recovered",
    "pair_curve_figures",
]

FloatArray = NDArray[np.float64]

GAP_MIN: Final = 1e-12
_THRESHOLDS: Final = {"cpt50": 0.5, "cpt80": 0.8}


def gap_recovered(preference: FloatArray, gain: FloatArray, seed: int) -> FloatArray:
    """Share of the pair's gap that is recovered with 0, 1, ... n strong calls, [n + 1].

    Queries go to the strong expert by falling ``preference``; ties are broken at random. ``gain``
    [n] is the strong expert's score less the weak one's. All NaN where the two are equal.
    """
    lottery = np.random.default_rng(seed).permutation(len(preference))
    order = lottery[np.argsort(-preference[lottery], kind="stable")]
    whole = float(gain.sum())
    if abs(whole) < GAP_MIN:
        return np.full(len(gain) + 1, np.nan)
    return np.concatenate([[0.0], np.cumsum(gain[order])]) / whole


def apgr(recovered: FloatArray) -> float:
    """Average performance gap recovered; chance has .5, a perfect order may pass 1."""
    return float(recovered.mean())


def call_performance_threshold(recovered: FloatArray, share: float) -> float | None:
    """CPT: the least share of strong calls that recovers ``share`` of the gap, in per cent."""
    reached = np.flatnonzero(recovered >= share)
    return float(100 * reached[0] / (len(recovered) - 1)) if len(reached) else None


def pair_curve_figures(
    calls: FloatArray, score: FloatArray, weak: float, strong: float
) -> dict[str, float | None]:
    """APGR, CPT50 and CPT80 of settings that call the strong expert for a share of the queries.

    ``calls`` and ``score`` [s] are each setting's share of strong calls and mean score, ``weak``
    and ``strong`` the two experts' scores. Between settings a coin decides, and the experts alone
    are the ends, so the curve runs from no calls to all. A call of the weak expert is free here, as
    it is for RouteLLM: a cascade that drafts with it first is not charged for the draft. None for
    all where the two experts score the same.
    """
    if abs(strong - weak) < GAP_MIN:
        return dict.fromkeys(("apgr", *_THRESHOLDS))
    order = np.argsort(calls, kind="stable")
    share = np.concatenate([[0.0], calls[order], [1.0]])
    recovered = np.concatenate([[weak], score[order], [strong]]) - weak
    recovered /= strong - weak
    reached = {name: cost_to_reach(share, recovered, part) for name, part in _THRESHOLDS.items()}
    return {
        "apgr": area(share, recovered, 0.0, 1.0),
        **{name: None if least is None else 100 * least for name, least in reached.items()},
    }
