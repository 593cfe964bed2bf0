"""Paired bootstrap over queries: every interval of an evaluation comes from here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Interval", "resampled", "resampled_mean", "resampled_rows"]

FloatArray = NDArray[np.float64]
Interval = dict[str, float]

RESAMPLES: Final = 2000
CURVE_RESAMPLES: Final = 500


def resampled_mean(differences: FloatArray, seed: int) -> Interval:
    """The mean of per-query differences [n], with its 95 % interval."""
    return resampled_rows(lambda rows: float(differences[rows].mean()), len(differences), seed)


def resampled_rows(figure: Callable[[NDArray[np.int64]], float], n: int, seed: int) -> Interval:
    """A difference that takes the drawn queries as row numbers [n]."""
    rng = np.random.default_rng(seed)
    drawn = [figure(rng.integers(0, n, n)) for _ in range(RESAMPLES)]
    return _interval(figure(np.arange(n)), drawn)


def resampled(
    figure: Callable[[FloatArray], float], n: int, seed: int, resamples: int | None = None
) -> Interval:
    """A difference that takes the drawn queries as weights [n]: how often each was drawn.

    For whole curves, so drawn less often: 500 times unless ``resamples`` says otherwise.
    """
    rng = np.random.default_rng(seed)
    drawn = [
        figure(np.bincount(rng.integers(0, n, n), minlength=n).astype(np.float64))
        for _ in range(CURVE_RESAMPLES if resamples is None else resamples)
    ]
    return _interval(figure(np.ones(n)), drawn)


def _interval(value: float, drawn: list[float]) -> Interval:
    """Draws without a value, as a gap of two experts that are equal on them, are left out."""
    low, high = np.nanquantile(np.array(drawn), [0.025, 0.975])
    return {"difference": value, "low": float(low), "high": float(high)}
