"""The threshold cascade: a fixed chain, going on while an answer's estimate is below a threshold.

FrugalGPT (Chen et al., 2305.05176): chain and thresholds are chosen together on training rows.
Chains of one, two and three experts in order of cost are tried, thresholds on quantiles of the
estimates among the queries that reach the stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gateway.evaluation.cascade_replay import Recorded
from gateway.evaluation.curve_metrics import upper_hull

FloatArray = NDArray[np.float64]

__all__ = ["Chain", "threshold_cascade"]

_PAIR_QUANTILES = np.linspace(0.02, 0.98, 25)
_TRIPLE_QUANTILES = np.linspace(0.1, 0.9, 9)


@dataclass(frozen=True, slots=True)
class Chain:
    """Experts by position; ``thresholds[i]`` is the least estimate that ends it at expert i."""

    experts: tuple[int, ...]
    thresholds: tuple[float, ...]

    def run(self, recorded: Recorded, after: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Score and cost per query (n,) for answers' estimates ``after`` (n, k)."""
        score = recorded.score[:, self.experts[0]].copy()
        cost = recorded.cost[:, self.experts[0]].copy()
        going = np.ones(len(score), dtype=bool)
        for held, threshold, following in zip(
            self.experts, self.thresholds, self.experts[1:], strict=False
        ):
            going &= after[:, held] < threshold
            score[going] = recorded.score[going, following]
            cost[going] += recorded.cost[going, following]
        return score, cost


def threshold_cascade(
    train: Recorded, after_train: FloatArray, test: Recorded, after_test: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """(settings, m) scores and costs on test of the chains on the training rows' hull."""
    chains = list(_chains(train, after_train))
    means = np.array([[part.mean() for part in chain.run(train, after_train)] for chain in chains])
    kept = [chains[i] for i in upper_hull(means[:, 1], means[:, 0])]
    runs = [chain.run(test, after_test) for chain in kept]
    return np.stack([score for score, _ in runs]), np.stack([cost for _, cost in runs])


def _chains(train: Recorded, after: FloatArray) -> Iterator[Chain]:
    order = [int(j) for j in np.argsort(train.cost.mean(axis=0), kind="stable")]
    for at, first in enumerate(order):
        yield Chain((first,), ())
        for there, second in enumerate(order[at + 1 :], start=at + 1):
            for threshold in np.quantile(after[:, first], _PAIR_QUANTILES):
                yield Chain((first, second), (float(threshold),))
            yield from _triples(after, first, second, order[there + 1 :])


def _triples(after: FloatArray, first: int, second: int, rest: list[int]) -> Iterator[Chain]:
    for threshold in np.quantile(after[:, first], _TRIPLE_QUANTILES):
        reached = after[after[:, first] < threshold, second]
        if not len(reached):
            continue
        for third in rest:
            for next_threshold in np.quantile(reached, _TRIPLE_QUANTILES):
                yield Chain((first, second, third), (float(threshold), float(next_threshold)))
