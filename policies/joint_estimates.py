"""What one expert's answer says about all the experts: linear estimates under a joint covariance.

Write u for the estimates before any answer, s for the estimates each expert's own answer gives
about itself (``policies.post_answer``), t = s - u for the news in it, and r = score - u. The
covariance of (r, t) over training rows gives, for every set R of experts already run, the linear
minimum-mean-square-error estimate

    q(R) = u + cov(r, t_R) · cov(t_R, t_R)⁻¹ · t_R

and the covariance of what further answers will change. Cascade routing (Dekoninck et al.,
2410.10347, section 3) fits one regression per run set; here all 2^M sets come from one matrix of
M² numbers, so that a few hundred rows are enough, and the errors' correlation is part of it.

Correlations are shrunk towards their mean (Ledoit and Wolf, "Honey, I shrunk the sample covariance
matrix", 2004, section 2), and the expected size of news is halved: the best of several estimated
gains is an overestimate, and a cascade that believes it in full runs too many stages. Both
constants were set on half splits of recorded answers; ``docs/policies.md`` has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from policies.post_answer import FloatArray

__all__ = ["JointEstimates", "Run", "fit_joint_estimates"]

Run: TypeAlias = tuple[int, ...]  # experts already run, by position, in ascending order

_RIDGE = 0.05  # of a signal's own variance
_VARIANCE_MIN = 1e-9
_CORRELATION_ROWS = 300.0  # of the mean correlation, beside each pair's own rows
_CAUTION = 0.5  # of the standard deviation of news


@dataclass(frozen=True, slots=True)
class _Updates:
    """For one run set: the weights of its news, and what each further answer would move."""

    weights: FloatArray  # (k, |R|)
    moves: FloatArray  # (k, k): row m is the standard deviation, signed, of every estimate's change
    explained: FloatArray  # (k, k): covariance of the estimates that its news makes


@dataclass(frozen=True, slots=True)
class JointEstimates:
    """Fitted covariances: ``effect`` (k, k) of r and t, ``news`` (k, k) of t with itself.

    ``spread`` (k,) is the training mean of u·(1 - u): a query's own u·(1 - u) over it scales the
    expected size of an expert's news, because little can be learnt of what is nearly certain.
    """

    effect: FloatArray
    news: FloatArray
    spread: FloatArray
    _cache: dict[Run, _Updates] = field(default_factory=dict, compare=False, repr=False)

    @property
    def experts(self) -> int:
        return len(self.spread)

    def quality(self, run: Run, prior: FloatArray, after: FloatArray) -> FloatArray:
        """Estimates (n, k) given the answers of ``run``: prior (n, k), after (n, k).

        Of ``after``, only the columns in ``run`` are read.
        """
        if not run:
            return prior
        columns = list(run)
        told = after[:, columns] - prior[:, columns]
        return np.clip(prior + told @ self._updates(run).weights.T, 0.0, 1.0)

    def moves(self, run: Run, quality: FloatArray) -> FloatArray:
        """(n, k, k): entry [row, m, i] is how far one standard deviation of m's news moves i."""
        certain = quality * (1.0 - quality) / np.maximum(self.spread, _VARIANCE_MIN)
        scale = np.sqrt(np.clip(certain, 0.0, 4.0))
        moves = self._updates(run).moves[None, :, :]
        return np.asarray(_CAUTION * moves * scale[:, :, None])

    def first_moves(self) -> FloatArray:
        """(k, k): entry [m, i] is how far one standard deviation of m's news, heard first, moves i.

        Of a typical query; ``moves`` scales it by what is still uncertain of the one at hand.
        """
        return np.asarray(_CAUTION * self._updates(()).moves)

    def covariance(self, run: Run, further: Run) -> FloatArray:
        """(k, k) covariance of what the answers of ``further`` will change, after ``run``."""
        now, then = self._updates(run).explained, self._updates(tuple(sorted(run + further)))
        return _CAUTION**2 * (then.explained - now)

    def _updates(self, run: Run) -> _Updates:
        found = self._cache.get(run)
        if found is None:
            found = self._cache[run] = self._solve(run)
        return found

    def _solve(self, run: Run) -> _Updates:
        columns = list(run)
        within = self.news[np.ix_(columns, columns)]
        within = within + np.diag(_RIDGE * np.diag(within) + _VARIANCE_MIN)
        weights = _solved(within, self.effect[:, columns].T).T
        onto = _solved(within, self.news[columns, :])
        left = np.diag(self.news) - np.einsum("jm,jm->m", self.news[columns, :], onto)
        change = self.effect - weights @ self.news[columns, :]
        moves = change / np.sqrt(np.maximum(left, _VARIANCE_MIN))
        moves = np.where(left > _RIDGE * np.diag(self.news), moves, 0.0).T
        moves[columns, :] = 0.0
        return _Updates(weights, moves, weights @ within @ weights.T)


def _solved(matrix: FloatArray, right: FloatArray) -> FloatArray:
    """The solution of a linear system, an empty one included."""
    return np.asarray(np.linalg.solve(matrix, right) if matrix.size else right, dtype=np.float64)


def fit_joint_estimates(
    prior: FloatArray,
    after: FloatArray,
    score: FloatArray,
    categories: Sequence[str] | None = None,
    *,
    shrink_rows: float = 200.0,
) -> tuple[JointEstimates, dict[str, JointEstimates]]:
    """Fit on (n, k) arrays whose estimates were made without the row they are for.

    Returns the fit over all rows and one per category, shrunk towards it by its row count.
    """
    overall = _fit(prior, after, score)
    if categories is None:
        return overall, {}
    names = np.asarray(categories)
    fits: dict[str, JointEstimates] = {}
    for name in sorted(set(categories)):
        rows = names == name
        own = _fit(prior[rows], after[rows], score[rows])
        share = float(rows.sum()) / (float(rows.sum()) + shrink_rows)
        fits[name] = JointEstimates(
            share * own.effect + (1.0 - share) * overall.effect,
            share * own.news + (1.0 - share) * overall.news,
            own.spread,
        )
    return overall, fits


def _fit(prior: FloatArray, after: FloatArray, score: FloatArray) -> JointEstimates:
    error, news = score - prior, after - prior
    rows = max(len(prior), 1)
    effect, news_cov = error.T @ news / rows, news.T @ news / rows
    error_sd, news_sd = np.sqrt((error**2).mean(axis=0)), np.sqrt(np.diag(news_cov))
    return JointEstimates(
        effect=_shrunk(effect, np.outer(error_sd, news_sd), rows),
        news=_shrunk(news_cov, np.outer(news_sd, news_sd), rows),
        spread=(prior * (1.0 - prior)).mean(axis=0),
    )


def _shrunk(covariance: FloatArray, scale: FloatArray, rows: int) -> FloatArray:
    """Off-diagonal correlations moved towards their mean; the diagonal stays."""
    off = ~np.eye(len(covariance), dtype=bool)
    if not off.any():
        return covariance
    correlation = covariance / np.maximum(scale, _VARIANCE_MIN)
    weight = _CORRELATION_ROWS / (rows + _CORRELATION_ROWS)
    mixed = weight * correlation[off].mean() + (1.0 - weight) * correlation
    return np.where(off, mixed, correlation) * scale
