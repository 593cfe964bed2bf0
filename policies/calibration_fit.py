"""Fit a ``Calibration`` to answers of one expert that are known to be right or wrong.

Logistic regression on the features that serving reads, with signs that policy files hold to: a
token of higher probability, or more agreement, never lowers the confidence, and more entropy never
raises it. That also keeps features that go together from pulling against each other on a hundred
answers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize
from scipy.special import expit

from policies.answer_features import answer_features, entropy_features, log_doubt
from policies.calibration import Calibration, EntropyWeights, Evidence, OneWeight

__all__ = ["GROUPS", "Group", "fit_calibration"]

Group: TypeAlias = Literal["tokens", "doubt", "entropy", "length", "agreement"]
GROUPS: Final[tuple[Group, ...]] = ("tokens", "doubt", "entropy", "length", "agreement")
FloatArray: TypeAlias = NDArray[np.float64]

_SLOPE_MIN: Final = 0.001  # a policy's slope is above 0
_PENALTY: Final = 0.01  # of squared weights, beside the summed log loss
_CATEGORY_PENALTY: Final = 4.0  # of a category's squared offset: half a unit of log-odds is usual
_BOUND: Final = 1000.0
_UP, _DOWN, _EITHER = (0.0, _BOUND), (-_BOUND, 0.0), (-_BOUND, _BOUND)
_NAMES: Final = {
    "tokens": ("minimum", "first", "quantile_10", "quantile_25", "quantile_50"),
    "doubt": ("doubt",),
    "entropy": ("mean", "maximum", "quantile_90"),
    "length": ("weight",),
    "agreement": ("weight",),
}
_BOUNDS: Final = {
    "tokens": _UP,
    "doubt": _DOWN,
    "entropy": _DOWN,
    "length": _EITHER,
    "agreement": _UP,
}
_OF_THE_MEAN: Final = ("tokens", "doubt")  # never missing, and no section of their own in a file


@dataclass(frozen=True, slots=True)
class _Columns:
    """One group's features (n, f), 0 where an answer lacks them, and which answers do (n,)."""

    group: Group
    values: FloatArray
    missing: NDArray[np.bool_]


def fit_calibration(
    answers: Sequence[Evidence],
    right: Sequence[bool],
    *,
    groups: Collection[Group] = GROUPS,
    categories: Sequence[str] | None = None,
) -> Calibration:
    """``right``: whether each answer was; without ``groups``, Platt's two numbers.

    A group that no answer has is left out. What stands for a group that is ``missing`` is fitted on
    the answers without it, or, where every answer has it, is the offset that keeps the mean
    confidence of the same answers right without it. With ``categories``, each gets an offset to the
    intercept, drawn to 0 by a normal prior and so the more, the fewer its answers. Deterministic.
    Raises ValueError unless there are right and wrong answers, each with at least one token.
    """
    truth = np.array(right, dtype=np.float64)
    if not 0.0 < truth.mean() < 1.0:
        raise ValueError("right and wrong answers are needed to fit a calibration")
    if any(not answer.logprobs for answer in answers):
        raise ValueError("an answer without log-probabilities has no features")
    columns = [_columns(group, answers) for group in GROUPS if group in groups]
    columns = [one for one in columns if not one.missing.all()]
    fit = _fitted(answers, columns, truth)
    fit = _with_missing(fit, columns, answers, truth)
    if categories is None:
        return fit
    return replace(fit, by_category=_offsets(fit, answers, truth, categories))


def _columns(group: Group, answers: Sequence[Evidence]) -> _Columns:
    rows = [_values(group, answer) for answer in answers]
    width = len(_NAMES[group])
    values = np.array([row or (0.0,) * width for row in rows], dtype=np.float64)
    return _Columns(group, values, np.array([row is None for row in rows]))


def _values(group: Group, answer: Evidence) -> tuple[float, ...] | None:
    match group:
        case "tokens":
            return answer_features(answer.logprobs).values()[1:]
        case "doubt":
            return (log_doubt(answer_features(answer.logprobs).mean),)
        case "entropy":
            return entropy_features(answer.entropies).values() if answer.entropies else None
        case "length":
            value = answer.log_tokens
        case "agreement":
            value = answer.agreement
    return None if value is None else (value,)


def _fitted(
    answers: Sequence[Evidence], columns: Sequence[_Columns], truth: FloatArray
) -> Calibration:
    """Weights of all groups at once; a column of its own says where a group is missing."""
    means = np.array([[answer_features(answer.logprobs).mean] for answer in answers])
    parts, bounds = [means], [(_SLOPE_MIN, _BOUND)]
    for one in columns:
        parts.append(one.values)
        bounds += [_BOUNDS[one.group]] * one.values.shape[1]
        if one.missing.any():
            parts.append(one.missing[:, None].astype(np.float64))
            bounds.append(_EITHER)
    weights = _minimised(np.hstack(parts), truth, bounds)
    slope, intercept = weights.pop(0), weights.pop()
    groups: dict[str, Any] = {}
    for one in columns:
        found = dict(zip(_NAMES[one.group], weights, strict=False))
        del weights[: len(found)]
        if one.missing.any():
            found["missing"] = weights.pop(0)
        if one.group in _OF_THE_MEAN:
            groups |= found
        else:
            groups[one.group] = (EntropyWeights if one.group == "entropy" else OneWeight)(**found)
    return Calibration(slope=slope, intercept=intercept, **groups)


def _minimised(
    rows: FloatArray, truth: FloatArray, bounds: Sequence[tuple[float, float]]
) -> list[float]:
    """Weights and, last, the intercept that minimise the penalised log loss."""
    design = np.hstack([rows, np.ones((len(rows), 1))])

    def loss(weights: FloatArray) -> tuple[float, FloatArray]:
        z = design @ weights
        value = np.logaddexp(0.0, z).sum() - truth @ z + _PENALTY * (weights[:-1] ** 2).sum() / 2
        slope = design.T @ (expit(z) - truth)
        slope[:-1] += _PENALTY * weights[:-1]
        return float(value), slope

    start = np.array([1.0, *[0.0] * rows.shape[1]])
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[*bounds, _EITHER])
    return [float(value) for value in found.x]


def _with_missing(
    fit: Calibration, columns: Sequence[_Columns], answers: Sequence[Evidence], truth: FloatArray
) -> Calibration:
    """Offsets for groups that no answer here lacked."""
    for one in columns:
        if one.group in _OF_THE_MEAN or one.missing.any():
            continue
        absent: dict[str, Any] = {one.group: None}
        missing = _offset(_log_odds(replace(fit, **absent), answers), truth, penalty=0.0)
        weights: dict[str, Any] = {one.group: replace(getattr(fit, one.group), missing=missing)}
        fit = replace(fit, **weights)
    return fit


def _offsets(
    fit: Calibration, answers: Sequence[Evidence], truth: FloatArray, categories: Sequence[str]
) -> dict[str, float]:
    z, names = _log_odds(fit, answers), np.asarray(categories)
    return {
        name: _offset(z[names == name], truth[names == name], penalty=_CATEGORY_PENALTY)
        for name in sorted(set(categories))
    }


def _log_odds(fit: Calibration, answers: Sequence[Evidence]) -> FloatArray:
    return np.array([fit.log_odds(answer) for answer in answers], dtype=np.float64)


def _offset(z: FloatArray, truth: FloatArray, *, penalty: float) -> float:
    """What to add to every z so that the penalised log loss is least."""

    def gradient(offset: float) -> float:
        return float((expit(z + offset) - truth).sum() + penalty * offset)

    return float(brentq(gradient, -_BOUND, _BOUND))
