"""Fit a ``Calibration`` to answers of one expert that are known to be right or wrong.

Logistic regression on ``policies.answer_features`` with weights that may not be negative: a token
of higher probability never lowers the confidence (policy files refuse that as well), which also
keeps features that go together from pulling against each other on a hundred answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from policies.answer_features import answer_features
from policies.types import Calibration

__all__ = ["fit_calibration"]

_SLOPE_MIN: Final = 0.001  # a policy's slope is above 0
_PENALTY: Final = 0.01  # of squared weights, beside the summed log loss
_BOUND: Final = 1000.0


def fit_calibration(
    answers: Sequence[Sequence[float]], right: Sequence[bool], *, mean_only: bool = False
) -> Calibration:
    """``answers``: token log-probabilities, one sequence an answer; ``right``: whether it was.

    ``mean_only`` fits Platt's two numbers. Deterministic. Raises ValueError unless there are right
    and wrong answers, each with at least one token.
    """
    truth = np.array(right, dtype=np.float64)
    if not 0.0 < truth.mean() < 1.0:
        raise ValueError("right and wrong answers are needed to fit a calibration")
    rows = np.array([answer_features(tokens).values() for tokens in answers])
    columns = 1 if mean_only else rows.shape[1]
    found = _fitted(rows[:, :columns], truth)
    mean, *others = found[:-1]
    names = ("minimum", "first", "quantile_10", "quantile_25", "quantile_50")
    weights = dict(zip(names, others, strict=not mean_only))
    return Calibration(slope=mean, intercept=found[-1], **weights)


def _fitted(rows: NDArray[np.float64], truth: NDArray[np.float64]) -> list[float]:
    """Weights and, last, the intercept that minimise the penalised log loss."""
    design = np.hstack([rows, np.ones((len(rows), 1))])

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        z = design @ weights
        value = np.logaddexp(0.0, z).sum() - truth @ z + _PENALTY * (weights[:-1] ** 2).sum() / 2
        slope = design.T @ (expit(z) - truth)
        slope[:-1] += _PENALTY * weights[:-1]
        return float(value), slope

    lower = [_SLOPE_MIN, *[0.0] * (rows.shape[1] - 1), -_BOUND]
    start = np.array([1.0, *[0.0] * rows.shape[1]])
    bounds = [(low, _BOUND) for low in lower]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return [float(value) for value in found.x]
