"""Fit a ``Novelty`` on out-of-fold rows, where distance tells what is out of scope."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from routers.novelty import Novelty, signals_of
from routers.types import GENERAL

__all__ = ["fit_novelty"]

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

_ROWS_MIN: Final = 20  # of ``general``, and of the rest: fewer tell nothing
_PENALTY: Final = 0.5  # on squared slopes of standardised signals, beside the log loss' sum
_EVIDENCE_MIN: Final = 3.84  # of twice the log likelihood: 5 % of chi square, one degree
_PRICE: Final = 0.005  # share of the specialists' queries, rightly guessed, that it may turn away
_SHARE_MAX: Final = 0.5  # what is likelier general than not is general


def fit_novelty(
    posterior: Float64Array,
    nearest: Float64Array,
    labels: IntArray,
    categories: Sequence[str],
) -> Novelty | None:
    """Fit on out-of-fold posteriors [n, c] and cosines [n].

    None without enough ``general`` rows, and where distance does not tell them from the others
    (likelihood-ratio test): then ``general`` is a category like any other, and the posterior knows.

    The regression keeps the share of ``general`` rows that training has. The gate does not: how
    many strangers traffic brings is unknown, so it turns away as many of them as it can while at
    most ``_PRICE`` of the rightly guessed specialists' queries go with them (Neyman-Pearson).
    """
    if GENERAL not in categories:
        return None
    general = labels == categories.index(GENERAL)
    if min(general.sum(), (~general).sum()) < _ROWS_MIN:
        return None
    signals = signals_of(posterior, nearest, categories)
    slopes, bias, loss = _logistic(signals, general)
    if 2 * (_logistic(signals[:, :2], general)[2] - loss) < _EVIDENCE_MIN:
        return None
    logit = signals @ slopes + bias
    right = ~general & (posterior.argmax(axis=1) == labels)
    limit = _highest(logit[right]) if right.any() else 0.0
    share_max = min(_SHARE_MAX, float(1 / (1 + np.exp(-limit))))
    numbers = (round(float(x), 4) for x in (*slopes, bias, share_max))
    return Novelty(*numbers)


def _highest(logit: Float64Array) -> float:
    return float(np.quantile(logit, 1 - _PRICE))


def _logistic(
    signals: Float64Array, general: NDArray[np.bool_]
) -> tuple[Float64Array, float, float]:
    """Slopes [p], none negative, and intercept with the least penalised log loss; that loss."""
    centre, spread = signals.mean(axis=0), np.maximum(signals.std(axis=0), 1e-9)
    units = (signals - centre) / spread
    truth = general.astype(np.float64)

    def loss(at: Float64Array) -> tuple[float, Float64Array]:
        z = units @ at[:-1] + at[-1]
        missed = 1 / (1 + np.exp(-z)) - truth
        value = (np.logaddexp(0, z) - truth * z).sum() + _PENALTY * (at[:-1] ** 2).sum()
        slope = np.append(units.T @ missed + 2 * _PENALTY * at[:-1], missed.sum())
        return float(value), slope

    count = signals.shape[1]
    bounds = [(0, None)] * count + [(None, None)]
    found = minimize(loss, np.zeros(count + 1), jac=True, method="L-BFGS-B", bounds=bounds)
    slopes = found.x[:-1] / spread
    return slopes, float(found.x[-1] - slopes @ centre), float(found.fun)
