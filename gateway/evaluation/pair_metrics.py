"""Metrics of two-expert sets, as RouteLLM defines them (arXiv 2406.18665, section 4)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["apgr", "call_performance_threshold", "gap_recovered"]

FloatArray = NDArray[np.float64]


def gap_recovered(preference: FloatArray, gain: FloatArray, seed: int) -> FloatArray:
    """Share of the pair's gap that is recovered with 0, 1, ... n strong calls, [n + 1].

    Queries go to the strong expert by falling ``preference``; ties are broken at random. ``gain``
    [n] is the strong expert's score less the weak one's. All NaN where the two are equal.
    """
    lottery = np.random.default_rng(seed).permutation(len(preference))
    order = lottery[np.argsort(-preference[lottery], kind="stable")]
    whole = float(gain.sum())
    if abs(whole) < 1e-12:
        return np.full(len(gain) + 1, np.nan)
    return np.concatenate([[0.0], np.cumsum(gain[order])]) / whole


def apgr(recovered: FloatArray) -> float:
    """Average performance gap recovered; chance has .5, a perfect order may pass 1."""
    return float(recovered.mean())


def call_performance_threshold(recovered: FloatArray, share: float) -> float | None:
    """CPT: the least share of strong calls that recovers ``share`` of the gap, in per cent."""
    reached = np.flatnonzero(recovered >= share)
    return float(100 * reached[0] / (len(recovered) - 1)) if len(reached) else None
