"""The two routers that every paper begins with, on the same rows: neighbours, and one logistic
regression per expert, both on the embedding alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from gateway.evaluation.curve_metrics import area
from gateway.evaluation.scored import Scored
from policies.frontier import Corner, solve_frontier
from routers.quality_sample import folds_of

__all__ = ["plain_routers"]

FloatArray = NDArray[np.float64]
Predict = Callable[[NDArray[Any], FloatArray, NDArray[Any], float], FloatArray]

_FOLDS: Final = 5
_NEIGHBOURS: Final = (20.0, 50.0, 100.0, 200.0)
_INVERSE_PENALTIES: Final = (0.1, 0.3, 1.0)


def plain_routers(
    scored: Scored, known: NDArray[np.float32], held: NDArray[np.float32]
) -> dict[str, Scored]:
    """By name, what ``scored`` would be with their estimates of quality; its cost estimates stay.

    ``known`` [m, d] and ``held`` [n, d] are the embeddings of the training and the scored prompts.

    The number of neighbours and the penalty are those whose frontier, solved on out-of-fold
    training rows as the router's own, has the largest area on those rows.
    """
    methods: Mapping[str, tuple[Predict, Sequence[float]]] = {
        "knn": (_neighbours, _NEIGHBOURS),
        "logistic": (_logistic, _INVERSE_PENALTIES),
    }
    return {
        name: _with_estimates(scored, known, held, predict, choices)
        for name, (predict, choices) in methods.items()
    }


def _with_estimates(
    scored: Scored,
    known: NDArray[np.float32],
    held: NDArray[np.float32],
    predict: Predict,
    choices: Sequence[float],
) -> Scored:
    evidence = scored.known.evidence
    score = evidence.score
    _, groups = np.unique(evidence.keys, return_inverse=True)
    folds = list(folds_of(groups.astype(np.int64), _FOLDS, 0))

    def out_of_fold(choice: float) -> FloatArray:
        quality = np.zeros_like(score)
        for rest, out in folds:
            quality[out] = predict(known[rest], score[rest], known[out], choice)
        return quality

    def frontier(choice: float) -> tuple[Corner, ...]:
        return solve_frontier(out_of_fold(choice), evidence.expected_cost, score, evidence.cost)

    limits = evidence.cost.mean(axis=0).min(), evidence.cost.mean(axis=0).max()
    tried = {choice: frontier(choice) for choice in choices}
    best = max(choices, key=lambda choice: _area(tried[choice], *limits))
    quality = predict(known, score, held, best)
    return replace(scored, quality=quality, mapped=quality, corners=tried[best])


def _area(corners: Sequence[Corner], low: float, high: float) -> float:
    cost, score = np.array([(corner.cost, corner.score) for corner in corners]).T
    return area(cost, score, low, high)


def _neighbours(
    known: NDArray[Any], score: FloatArray, asked: NDArray[Any], count: float
) -> FloatArray:
    """Mean outcome of the nearest ``count`` prompts by cosine."""
    near = min(int(count), len(known))
    top = np.argpartition(-(asked @ known.T), near - 1, axis=1)[:, :near]
    result: FloatArray = score[top].mean(axis=1)
    return result


def _logistic(
    known: NDArray[Any], score: FloatArray, asked: NDArray[Any], inverse_penalty: float
) -> FloatArray:
    """P(right) per expert; a score between 0 and 1 counts as that share of a right answer."""
    truth = np.repeat([1, 0], len(known))
    rows = np.vstack([known, known])
    columns = []
    for column in score.T:
        if np.ptp(column) == 0:
            columns.append(np.full(len(asked), column[0]))
            continue
        weight = np.concatenate([column, 1 - column])
        used = weight > 0
        model = LogisticRegression(C=inverse_penalty, max_iter=300)
        model.fit(rows[used], truth[used], sample_weight=weight[used])
        columns.append(model.predict_proba(asked)[:, 1])
    return np.stack(columns, axis=1)
