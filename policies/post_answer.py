"""From an answer's confidence features to P(the answer is good), per expert.

A generated answer's token log-probabilities say something about whether it is right, but on a
scale of each expert's own: raw values are badly calibrated. One logistic regression per expert
(Platt, "Probabilistic outputs for support vector machines", 1999) takes a bounded transform of the
features together with the estimate made before the answer; with categories, every expert's
regression is fitted per category and shrunk towards the fit over all of them by its row count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from policies.answer_features import LOGPROB_FLOOR

FloatArray = NDArray[np.float64]

__all__ = ["PostAnswerModel", "confidence_features", "fit_post_answer"]

_CERTAIN = 1e-6  # a log-probability this close to 0 is reported as certainty
_INVERSE_PENALTY = 1.0
_PROBABILITY_MARGIN = 1e-3


def confidence_features(confidence: FloatArray) -> FloatArray:
    """Features (n, 4) of one raw log-probability per answer (n,), -inf and exact 0 among them.

    The probability itself, the log-probability, the logarithm of the doubt 1 - p, and whether the
    expert reported certainty: where many answers share one value, its own coefficient keeps that
    tie apart from values close to it.
    """
    logprob = np.clip(np.nan_to_num(confidence, neginf=LOGPROB_FLOOR), LOGPROB_FLOOR, 0.0)
    doubt = np.log(np.clip(-np.expm1(logprob), _CERTAIN, 1.0))
    certain = (logprob > -_CERTAIN).astype(np.float64)
    return np.stack([np.exp(logprob), logprob, doubt, certain], axis=1)


def logit(probability: FloatArray) -> FloatArray:
    """Log-odds, finite for probabilities of 0 and 1."""
    p = np.clip(probability, _PROBABILITY_MARGIN, 1.0 - _PROBABILITY_MARGIN)
    return np.asarray(np.log(p) - np.log1p(-p))


@dataclass(frozen=True, slots=True)
class PostAnswerModel:
    """One expert's fit. ``by_category`` holds the shrunk coefficients, ``overall`` the rest's.

    Coefficients (f + 2,): features, prior log-odds, intercept, on standardised features.
    """

    mean: FloatArray
    scale: FloatArray
    overall: FloatArray
    by_category: dict[str, FloatArray]

    def probability(
        self, features: FloatArray, prior: FloatArray, categories: Sequence[str] | None
    ) -> FloatArray:
        """P(good) per row: features (n, f), prior probabilities (n,)."""
        design = _design((features - self.mean) / self.scale, prior)
        if categories is None:
            return _sigmoid(design @ self.overall)
        rows = np.stack([self.by_category.get(name, self.overall) for name in categories])
        return _sigmoid(np.einsum("nf,nf->n", design, rows))


def fit_post_answer(
    features: FloatArray,
    prior: FloatArray,
    score: FloatArray,
    categories: Sequence[str] | None,
    *,
    shrink_rows: float = 100.0,
) -> PostAnswerModel:
    """Fit one expert: features (n, f), prior (n,), score (n,) in 0..1.

    A category's coefficients are (n_c · its own + shrink_rows · overall) / (n_c + shrink_rows).
    """
    mean = features.mean(axis=0)
    spread = features.std(axis=0)
    scale = np.where(spread > 0, spread, 1.0)
    design = _design((features - mean) / scale, prior)
    overall = _fit(design, score)
    return PostAnswerModel(
        mean=mean,
        scale=scale,
        overall=overall,
        by_category=_by_category(design, score, categories, overall, shrink_rows),
    )


def _by_category(
    design: FloatArray,
    score: FloatArray,
    categories: Sequence[str] | None,
    overall: FloatArray,
    shrink_rows: float,
) -> dict[str, FloatArray]:
    if categories is None or len(set(categories)) == 1:
        return {}
    names = np.asarray(categories)
    fits: dict[str, FloatArray] = {}
    for name in sorted(set(categories)):
        rows = names == name
        count = float(rows.sum())
        own = _fit(design[rows], score[rows])
        fits[name] = (count * own + shrink_rows * overall) / (count + shrink_rows)
    return fits


def _design(standardised: FloatArray, prior: FloatArray) -> FloatArray:
    ones = np.ones((len(prior), 1))
    return np.hstack([standardised, logit(prior)[:, None], ones])


def _fit(design: FloatArray, score: FloatArray) -> FloatArray:
    """Logistic regression on fractional scores: each row counts as good and as bad by its share."""
    from sklearn.linear_model import LogisticRegression

    good = score > 0
    bad = score < 1
    if not good.any() or not bad.any():
        only = np.zeros(design.shape[1])
        only[-1] = logit(np.array([(score.sum() + 0.5) / (len(score) + 1.0)]))[0]
        return only
    inputs = np.vstack([design[good], design[bad]])[:, :-1]
    labels = np.concatenate([np.ones(good.sum()), np.zeros(bad.sum())])
    weights = np.concatenate([score[good], 1.0 - score[bad]])
    model: Any = LogisticRegression(C=_INVERSE_PENALTY, max_iter=500)
    model.fit(inputs, labels, sample_weight=weights)
    return np.append(model.coef_[0], model.intercept_[0])


def _sigmoid(z: FloatArray) -> FloatArray:
    from scipy.special import expit

    return np.asarray(expit(z), dtype=np.float64)
