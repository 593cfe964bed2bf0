"""Cascade routing on recorded outcomes, beside the threshold cascade and plain routing.

Everything is chosen on training rows, with estimates made for them by models that have not seen
them; test rows are run once, at the prices and thresholds so chosen. A stage that runs is paid for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from gateway.evaluation.cascade_replay import Estimates, Recorded, prices_of, replay
from gateway.evaluation.cascade_result import CascadeResult, Curve
from gateway.evaluation.cascade_stages import stages_by_category
from gateway.evaluation.curve_metrics import upper_hull
from gateway.evaluation.threshold_cascade import threshold_cascade
from policies.cascade_routing import Search
from policies.joint_estimates import fit_joint_estimates
from policies.post_answer import confidence_features, fit_post_answer

__all__ = ["CascadeData", "estimates_of", "evaluate_cascade"]

FloatArray = NDArray[np.float64]
Tick = Callable[[str, int, int], None]

_FOLDS = 5
_STAGES = 3
_MEAN_ROWS = 5.0  # of the mean over all tasks, beside each task's own rows
_MARGIN = 0.005


@dataclass(frozen=True, slots=True)
class CascadeData:
    """Recorded outcomes of n training and m test queries over k experts.

    score, cost, confidence: (n, k) and (m, k); confidence is the raw log-probability of an answer,
    NaN where none was recorded.
    quality_train: out-of-fold estimates before any answer; quality_test: estimates on test rows.
    expected_cost_*: costs expected before any answer; None takes training means (per task).
    search: how cascade routing chooses the next expert, see ``policies.cascade_routing``.
    """

    experts: tuple[str, ...]
    score_train: FloatArray
    score_test: FloatArray
    cost_train: FloatArray
    cost_test: FloatArray
    confidence_train: FloatArray
    confidence_test: FloatArray
    quality_train: FloatArray
    quality_test: FloatArray
    seed: int
    tasks_train: Sequence[str] | None = None
    tasks_test: Sequence[str] | None = None
    expected_cost_train: FloatArray | None = None
    expected_cost_test: FloatArray | None = None
    search: Search = "greedy"


def evaluate_cascade(data: CascadeData, tick: Tick = lambda *_: None) -> CascadeResult:
    """Fit on the training rows, run the test rows. Deterministic for ``data.seed``.

    With several tasks, each is also looked at alone: settings chosen on its own training rows.
    """
    with threadpool_limits(1):  # small systems, many of them: threads cost more than they save
        train, test = estimates_of(data)
        rows = (
            Recorded(data.score_train, data.cost_train),
            Recorded(data.score_test, data.cost_test),
        )
        limits = stages_by_category(rows[0], train, _STAGES, data.search)
        train, test = replace(train, stages=limits), replace(test, stages=limits)
        tasks = sorted(set(train.categories) & set(test.categories))
        steps = 1 + (len(tasks) if len(tasks) > 1 else 0)
        result = _compared(rows, (train, test), data)
        tick("cascade", 1, steps)
        for done, task in enumerate(tasks if len(tasks) > 1 else (), start=2):
            at = [np.flatnonzero(np.array(part.categories) == task) for part in (train, test)]
            alone = _compared(
                (rows[0].rows(at[0]), rows[1].rows(at[1])),
                (train.rows(at[0]), test.rows(at[1])),
                data,
            )
            result.tasks[task] = alone
            tick("cascade", done, steps)
    return result


def _compared(
    rows: tuple[Recorded, Recorded], known: tuple[Estimates, Estimates], data: CascadeData
) -> CascadeResult:
    """All methods, each with the settings that are best on the training rows."""
    train, test = rows
    stages = min(_STAGES, train.score.shape[1])
    singles = Curve(test.score.T, test.cost.T, int(train.score.mean(axis=0).argmax()))
    on_hull = upper_hull(train.cost.mean(axis=0), train.score.mean(axis=0))
    return CascadeResult(
        curves={
            "cascade_routing": _priced_curve(rows, known, stages, data.search),
            "routing_alone": _priced_curve(rows, known, 1),
            "threshold_cascade": _hull_curve(
                *threshold_cascade(train, known[0].after, test, known[1].after)
            ),
            "zero_router": _hull_curve(singles.score[on_hull], singles.cost[on_hull]),
        },
        singles=singles,
        best_single=singles.best,
        seed=data.seed,
    )


def estimates_of(data: CascadeData) -> tuple[Estimates, Estimates]:
    tasks_train = list(data.tasks_train or ["all"] * len(data.score_train))
    tasks_test = list(data.tasks_test or ["all"] * len(data.score_test))
    prior_train, prior_test = _admitted_quality(data, tasks_train, tasks_test)
    data = replace(data, quality_train=prior_train, quality_test=prior_test)
    after_train, after_test = _post_answer(data, tasks_train, tasks_test)
    overall, joint = fit_joint_estimates(prior_train, after_train, data.score_train, tasks_train)
    by_task = {name: joint.get(name, overall) for name in {*tasks_train, *tasks_test}}
    cost_train, cost_test = _expected_cost(data, tasks_train, tasks_test)
    return (
        Estimates(prior_train, after_train, cost_train, by_task, tasks_train),
        Estimates(prior_test, after_test, cost_test, by_task, tasks_test),
    )


def _admitted_quality(
    data: CascadeData, tasks_train: list[str], tasks_test: list[str]
) -> tuple[FloatArray, FloatArray]:
    """The task's mean, moved by the estimates as far as they have proved right on training rows.

    How far is the slope of (score - mean) on (estimate - mean) over all experts, less its standard
    error over rows, between 0 and 1.
    The means leave a row itself out; the estimates did so already.
    """
    names = np.array(tasks_train)
    train, test = np.empty_like(data.quality_train), np.empty_like(data.quality_test)
    test[:] = data.score_train.mean(axis=0)
    for name in sorted({*tasks_train, *tasks_test}):
        rows, there = names == name, np.array(tasks_test) == name
        if not rows.any():
            continue
        score, estimate = data.score_train[rows], data.quality_train[rows]
        total, count = score.sum(axis=0), len(score)
        mean = (total + _MEAN_ROWS * data.score_train.mean(axis=0)) / (count + _MEAN_ROWS)
        without = (total - score + _MEAN_ROWS * mean) / (count - 1 + _MEAN_ROWS)
        signal = estimate - estimate.mean(axis=0)
        slope = _proved_slope(signal, score - without)
        train[rows] = without + slope * signal
        test[there] = mean + slope * (data.quality_test[there] - estimate.mean(axis=0))
    return np.clip(train, _MARGIN, 1 - _MARGIN), np.clip(test, _MARGIN, 1 - _MARGIN)


def _proved_slope(signal: FloatArray, gain: FloatArray) -> float:
    """Least squares through the origin; a row's experts err together, so rows are the sample."""
    power = float((signal**2).sum())
    if power <= 0.0:
        return 0.0
    slope = float((signal * gain).sum()) / power
    by_row = (signal * (gain - slope * signal)).sum(axis=1)
    error = float(np.sqrt((by_row**2).sum())) / power
    return min(1.0, max(0.0, slope - error))


def _post_answer(
    data: CascadeData, tasks_train: list[str], tasks_test: list[str]
) -> tuple[FloatArray, FloatArray]:
    """Each expert's own estimate after its answer: out of fold on training rows, and on test."""
    rng = np.random.default_rng(data.seed)
    n, k = data.score_train.shape
    fold = np.arange(n) % _FOLDS
    rng.shuffle(fold)
    names = np.array(tasks_train)
    after_train, after_test = np.empty((n, k)), np.empty(data.score_test.shape)
    for j in range(k):
        usual = _usual(data.confidence_train[:, j])
        features = confidence_features(_filled(data.confidence_train[:, j], usual))
        prior, score = data.quality_train[:, j], data.score_train[:, j]
        model = fit_post_answer(features, prior, score, tasks_train)
        after_test[:, j] = model.probability(
            confidence_features(_filled(data.confidence_test[:, j], usual)),
            data.quality_test[:, j],
            tasks_test,
        )
        for f in range(_FOLDS):
            seen, held = fold != f, fold == f
            model = fit_post_answer(features[seen], prior[seen], score[seen], list(names[seen]))
            after_train[held, j] = model.probability(features[held], prior[held], list(names[held]))
    return after_train, after_test


def _usual(confidence: FloatArray) -> float:
    """An expert's middle confidence; 0 where it never reported one, and then it tells nothing."""
    known = confidence[~np.isnan(confidence)]
    return float(np.median(known)) if len(known) else 0.0


def _filled(confidence: FloatArray, usual: float) -> FloatArray:
    """An answer without a confidence is taken for a usual one, not for a sure one."""
    return np.where(np.isnan(confidence), usual, confidence)


def _expected_cost(
    data: CascadeData, tasks_train: list[str], tasks_test: list[str]
) -> tuple[FloatArray, FloatArray]:
    if data.expected_cost_train is not None and data.expected_cost_test is not None:
        return data.expected_cost_train, data.expected_cost_test
    names = np.array(tasks_train)
    overall = data.cost_train.mean(axis=0)
    means = {name: data.cost_train[names == name].mean(axis=0) for name in set(tasks_train)}
    return (
        np.stack([means[name] for name in tasks_train]),
        np.stack([means.get(name, overall) for name in tasks_test]),
    )


def _hull_curve(score: FloatArray, cost: FloatArray) -> Curve:
    """Settings by ascending training cost on the training rows' hull: the last scores highest."""
    return Curve(score, cost, len(score) - 1)


def _priced_curve(
    recorded: tuple[Recorded, Recorded],
    known: tuple[Estimates, Estimates],
    stages: int,
    search: Search = "greedy",
) -> Curve:
    """One setting per price, none left out.

    A price has no parameter of its own to fit. Keeping only the prices on the training rows' hull
    keeps those that were lucky there: with a hundred rows that costs more than it gains.
    """
    prices = prices_of(known[0].cost)
    trained, tests = (
        [replay(*part, price, stages_max=stages, search=search) for price in prices]
        for part in zip(recorded, known, strict=True)
    )
    best = int(np.argmax([run.score.mean() for run in trained]))
    return Curve(
        np.stack([run.score for run in tests]),
        np.stack([run.cost for run in tests]),
        best,
        np.stack([run.ran for run in tests]),
    )
