"""Fit a ``RouterModel``: every choice is made on out-of-fold predictions, none on fitted rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from routers.classifier import (
    Float64Array,
    Gates,
    IntArray,
    LinearHead,
    Mixing,
    References,
    RouterModel,
    blended,
    knn_posterior,
    least_support,
    normalised_entropy,
    softmax,
)
from routers.metrics import GENERALIST_SCORE
from routers.novelty import rescaled
from routers.novelty_fit import fit_novelty
from routers.types import GENERAL, Classification

__all__ = [
    "FitSettings",
    "Sample",
    "cross_validated",
    "fit",
    "fit_with_decisions",
    "one_thread",
    "thinned_rows",
]

_TEMPERATURES: Final = (0.3, 0.5, 0.7, 1.0, 1.4)
_TEMPERATURE_BOUNDS: Final = (0.1, 5.0)
_GATE_QUANTILES: Final = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05)
_ENTROPY_STEPS: Final = 100
_UNFAMILIAR_SHARE: Final = 0.05  # turned away as unfamiliar where no general prompt says where
_GATE_TOLERANCE: Final = 0.002  # mean scores that close do not tell gates apart
_ABLATION_FLOORS: Final = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
_ABLATION_PRICE: Final = 0.005  # most that the defence may take from the mean score, with
_ABLATION_DEVIATIONS: Final = 1.645  # 95 % confidence (one-sided, normal)


@dataclass(frozen=True, slots=True)
class FitSettings:
    """What is searched, and how much. ``references_max`` bounds the cost of one query."""

    folds: int = 5
    neighbours: tuple[int, ...] = (5, 10, 20)
    knn_shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75)
    inverse_penalties: tuple[float, ...] = (3.0, 30.0)
    references_max: int = 20_000
    iterations_max: int = 500


@dataclass(frozen=True, slots=True)
class Sample:
    """Embedded, labelled rows: ``vectors`` [n, d] unit rows, ``labels`` [n] index into
    ``categories``, ``groups`` [n] ids that must not be split across folds; ``ablated`` [n, 2, d]
    the same texts without head and without tail, where the embedder offers that."""

    vectors: NDArray[np.float16]
    labels: IntArray
    groups: IntArray
    categories: tuple[str, ...]
    ablated: NDArray[np.float16] | None = None

    def rows(self, index: IntArray) -> Sample:
        return replace(
            self,
            vectors=self.vectors[index],
            labels=self.labels[index],
            groups=self.groups[index],
            ablated=None if self.ablated is None else self.ablated[index],
        )


@dataclass(frozen=True, slots=True)
class _OutOfFold:
    votes: dict[int, Float64Array]  # by number of neighbours, [n, c]
    linear: dict[float, Float64Array]  # by inverse penalty, [n, c]
    nearest: Float64Array  # [n]


def fit(sample: Sample, *, seed: int, settings: FitSettings | None = None) -> RouterModel:
    """Choose every parameter on out-of-fold rows, then fit on all rows.

    Deterministic for a seed. Temperature and mixing minimise the log loss; the gates maximise the
    mean ``decision_score`` of the whole chain.
    """
    with one_thread():
        return _fitted(sample, seed, settings or FitSettings())


def one_thread() -> AbstractContextManager[object]:
    """The order of sums, and so an artifact, must not depend on the number of cores."""
    limits: AbstractContextManager[object] = threadpool_limits(limits=1)
    return limits


def fit_with_decisions(
    sample: Sample, *, seed: int, settings: FitSettings
) -> tuple[RouterModel, Float64Array, list[Classification]]:
    """``fit``, with the out-of-fold posterior [n, c] and the decisions that follow from it.

    Cheaper than ``cross_validated`` and slightly kinder: mixing and gates saw these rows.
    """
    with one_thread():
        model, posterior, nearest = _fitted_with_posterior(sample, seed, settings)
        return model, posterior, model.decide(posterior, nearest)


def _fitted(sample: Sample, seed: int, settings: FitSettings) -> RouterModel:
    return _fitted_with_posterior(sample, seed, settings)[0]


def _fitted_with_posterior(
    sample: Sample, seed: int, settings: FitSettings
) -> tuple[RouterModel, Float64Array, Float64Array]:
    oof = _out_of_fold(sample, seed, settings)
    penalty, mixing = _best_mixing(oof, sample.labels, settings)
    posterior = blended(oof.votes[mixing.neighbours], oof.linear[penalty], mixing)
    gates = best_gates(posterior, oof.nearest, sample.labels, sample.categories)
    novelty = fit_novelty(posterior, oof.nearest, sample.labels, sample.categories)
    gates = replace(gates, novelty=novelty)
    if sample.ablated is not None:
        support = _ablated_support(sample, posterior, penalty, mixing, seed, settings)
        floor = best_ablation_min(posterior, oof.nearest, support, sample, gates)
        gates = replace(gates, ablation_min=floor)
    kept = _thinned(sample, settings.references_max, seed)
    references = References(kept.vectors, kept.labels)
    head = _head(sample, penalty, settings)
    model = RouterModel(sample.categories, references, head, mixing, gates)
    return model, posterior, oof.nearest


def cross_validated(
    sample: Sample,
    *,
    seed: int,
    settings: FitSettings | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Classification]:
    """Decisions for every row by a chain fitted, tuned and gated without its fold (nested)."""
    settings = settings or FitSettings()
    decisions: list[Classification | None] = [None] * len(sample.labels)
    for done, (rest, held) in enumerate(_folds(sample, settings.folds, seed), start=1):
        with one_thread():
            model = _fitted(sample.rows(rest), seed, settings)
            part = sample.rows(held)
            ablated = None if part.ablated is None else part.ablated.astype(np.float32)
            answers = model.classify(part.vectors.astype(np.float32), ablated)
        for row, answer in zip(held, answers, strict=True):
            decisions[row] = answer
        progress(done, settings.folds)
    return [d for d in decisions if d is not None]


def _folds(sample: Sample, folds: int, seed: int) -> Iterator[tuple[IntArray, IntArray]]:
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    yield from splitter.split(sample.vectors, sample.labels, sample.groups)


def _out_of_fold(sample: Sample, seed: int, settings: FitSettings) -> _OutOfFold:
    shape = (len(sample.labels), len(sample.categories))
    oof = _OutOfFold(
        votes={k: np.zeros(shape) for k in settings.neighbours},
        linear={c: np.zeros(shape) for c in settings.inverse_penalties},
        nearest=np.zeros(shape[0]),
    )
    for rest, held in _folds(sample, settings.folds, seed + 1):
        train = sample.rows(rest)
        queries = sample.vectors[held].astype(np.float32)
        cosines = queries @ train.vectors.astype(np.float32).T
        for k, votes in oof.votes.items():
            votes[held], oof.nearest[held] = knn_posterior(cosines, train.labels, shape[1], k)
        for penalty, linear in oof.linear.items():
            head = _head(train, penalty, settings)
            linear[held] = softmax(queries @ head.weights + head.bias)
    return oof


def _ablated_support(
    sample: Sample,
    posterior: Float64Array,
    penalty: float,
    mixing: Mixing,
    seed: int,
    settings: FitSettings,
) -> Float64Array:
    """Out of fold, [n]: what the best category keeps without head or tail."""
    assert sample.ablated is not None
    support = np.ones(len(sample.labels))
    for rest, held in _folds(sample, settings.folds, seed + 1):
        train = sample.rows(rest)
        queries = sample.ablated[held].astype(np.float32).reshape(2 * len(held), -1)
        cosines = queries @ train.vectors.astype(np.float32).T
        votes, _ = knn_posterior(cosines, train.labels, posterior.shape[1], mixing.neighbours)
        head = _head(train, penalty, settings)
        linear = softmax(queries @ head.weights + head.bias)
        support[held] = least_support(posterior[held], blended(votes, linear, mixing))
    return support


def best_ablation_min(
    posterior: Float64Array,
    nearest: Float64Array,
    support: Float64Array,
    sample: Sample,
    gates: Gates,
) -> float:
    """The highest floor that costs less than ``_ABLATION_PRICE`` with confidence.

    The bound counts, not the mean: of a thousand prompts a floor stops a handful, and the mean loss
    over so few is as likely to be too small as too large, while taking the highest floor that
    passes picks those where it is too small.
    """
    names, labels = sample.categories, sample.labels
    general = names.index(GENERAL) if GENERAL in names else -1
    entropy = normalised_entropy(posterior)
    closed = (entropy > gates.entropy_max) | (nearest < gates.similarity_min)
    if gates.novelty is not None:
        share = gates.novelty.share(posterior, nearest, names)
        closed |= share > gates.novelty.share_max
        posterior = rescaled(posterior, share, names)
    guess = posterior.argmax(axis=1)
    passed = (guess == labels).astype(np.float64)
    gated = np.where(labels == general, 1.0, GENERALIST_SCORE)

    def loss(floor: float) -> Float64Array:
        stopped = ~closed & (guess != general) & (support < floor)
        return np.where(stopped, passed - gated, 0.0)

    cheap = [f for f in _ABLATION_FLOORS if upper_bound(loss(f), sample.groups) < _ABLATION_PRICE]
    return max(cheap, default=0.0)


def upper_bound(values: Float64Array, groups: IntArray) -> float:
    """Upper 95 % confidence bound of the mean of ``values`` [n].

    Rows of one group share what they were made from, so groups are the sample: the error is the
    cluster-robust one (Liang and Zeger, "Longitudinal data analysis", 1986).
    """
    mean = float(values.mean())
    _, group = np.unique(groups, return_inverse=True)
    by_group = np.bincount(group, weights=values - mean)
    return mean + _ABLATION_DEVIATIONS * float(np.sqrt((by_group**2).sum())) / len(values)


def _head(sample: Sample, inverse_penalty: float, settings: FitSettings) -> LinearHead:
    model = LogisticRegression(C=inverse_penalty, max_iter=settings.iterations_max)
    model.fit(sample.vectors.astype(np.float32), sample.labels)
    return _expanded(model.coef_, model.intercept_, model.classes_, len(sample.categories))


def _expanded(
    coefficients: Float64Array, intercepts: Float64Array, present: IntArray, category_count: int
) -> LinearHead:
    """Bring scikit-learn's shapes to [d, c] and [c]; a category without rows is never chosen."""
    if len(present) == 2:  # one row stands for the log-odds of the second class
        coefficients = np.vstack([-coefficients / 2, coefficients / 2])
        intercepts = np.concatenate([-intercepts / 2, intercepts / 2])
    weights = np.zeros((coefficients.shape[1], category_count), dtype=np.float32)
    bias = np.full(category_count, -30.0, dtype=np.float32)
    weights[:, present] = coefficients.T
    bias[present] = intercepts
    return LinearHead(weights, bias)


def _best_mixing(oof: _OutOfFold, labels: IntArray, settings: FitSettings) -> tuple[float, Mixing]:
    """The inverse penalty and mixing with the least out-of-fold log loss."""
    grid = product(
        settings.inverse_penalties, settings.neighbours, settings.knn_shares, _TEMPERATURES
    )

    def loss(penalty: float, mixing: Mixing) -> float:
        posterior = blended(oof.votes[mixing.neighbours], oof.linear[penalty], mixing)
        return log_loss(posterior, labels)

    penalty, mixing = min(
        ((c, Mixing(k, share, t)) for c, k, share, t in grid), key=lambda pair: loss(*pair)
    )
    found = minimize_scalar(
        lambda t: loss(penalty, replace(mixing, temperature=float(t))),
        bounds=_TEMPERATURE_BOUNDS,
        method="bounded",
    )
    return penalty, replace(mixing, temperature=round(float(found.x), 4))


def log_loss(posterior: Float64Array, labels: IntArray) -> float:
    """Mean of −ln p(label) over rows [n, c]."""
    given = posterior[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(given, 1e-12)).mean())


def best_gates(
    posterior: Float64Array, nearest: Float64Array, labels: IntArray, categories: tuple[str, ...]
) -> Gates:
    """The gates with the highest mean decision score; the middle of those that are as good.

    Similarity candidates are low quantiles of the right, specialist guesses, so at most the
    largest quantile of queries that would have been right can be turned away by it. Without
    ``general`` among the labels no score can show what a stranger costs: the similarity gate then
    turns away the least familiar 5 % of rows.
    """
    entropy = normalised_entropy(posterior)
    guess = posterior.argmax(axis=1)
    general = categories.index(GENERAL) if GENERAL in categories else -1
    passed = (guess == labels).astype(np.float64)
    gated = np.where(labels == general, 1.0, GENERALIST_SCORE)
    sure = nearest[(guess == labels) & (labels != general)]
    if general < 0:
        floors = [float(np.quantile(nearest, _UNFAMILIAR_SHARE))]
    else:
        floors = [-1.0, *(np.quantile(sure, _GATE_QUANTILES) if len(sure) else [])]
    ceilings = np.linspace(0.0, 1.0, _ENTROPY_STEPS + 1)[1:]

    def score(gates: Gates) -> float:
        closed = (entropy > gates.entropy_max) | (nearest < gates.similarity_min)
        return float(np.where(closed, gated, passed).mean())

    scored = [(score(g), g) for g in (Gates(float(h), float(s)) for h in ceilings for s in floors)]
    top = max(value for value, _ in scored)
    return _middle([gates for value, gates in scored if value >= top - _GATE_TOLERANCE])


def _middle(equals: Sequence[Gates]) -> Gates:
    """The member nearest to the medians: a gate at the edge of its own data fits only that data."""
    h = float(np.median([g.entropy_max for g in equals]))
    s = float(np.median([g.similarity_min for g in equals]))
    best = min(equals, key=lambda g: abs(g.entropy_max - h) + abs(g.similarity_min - s))
    return Gates(round(best.entropy_max, 4), round(best.similarity_min, 4))


def _thinned(sample: Sample, rows_max: int, seed: int) -> Sample:
    rows = len(sample.labels)
    return sample if rows <= rows_max else sample.rows(thinned_rows(rows, rows_max, seed))


def thinned_rows(rows: int, rows_max: int, seed: int) -> IntArray:
    """Which rows become references: all, or a random ``rows_max`` of them, in their order."""
    if rows <= rows_max:
        return np.arange(rows)
    return np.sort(np.random.default_rng(seed).choice(rows, rows_max, replace=False))
