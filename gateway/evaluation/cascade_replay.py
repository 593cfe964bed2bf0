"""Replays recorded answers through cascade routing: every stage that runs is paid for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from policies.cascade_routing import STOP, Search, next_experts
from policies.joint_estimates import JointEstimates, Run
from policies.post_answer import FloatArray

__all__ = ["Estimates", "Outcome", "Recorded", "prices_of", "replay"]

IntArray = NDArray[np.int64]

_PRICES = 32


@dataclass(frozen=True, slots=True)
class Recorded:
    """What every expert answered: score and true cost (n, k)."""

    score: FloatArray
    cost: FloatArray

    def rows(self, index: IntArray) -> Recorded:
        return Recorded(self.score[index], self.cost[index])


@dataclass(frozen=True, slots=True)
class Estimates:
    """What is known of n queries: before any answer, and after each expert's own.

    prior, after, cost: (n, k). ``after[:, j]`` may be used only once expert j has run.
    ``joint`` by category; ``categories`` (n,) names each row's. ``stages``: the most answers that
    a category may have, where it has a bound of its own.
    """

    prior: FloatArray
    after: FloatArray
    cost: FloatArray
    joint: Mapping[str, JointEstimates]
    categories: Sequence[str]
    stages: Mapping[str, int] = field(default_factory=dict)

    def rows(self, index: IntArray) -> Estimates:
        names = [self.categories[i] for i in index.tolist()]
        return replace(
            self,
            prior=self.prior[index],
            after=self.after[index],
            cost=self.cost[index],
            categories=names,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """Per query (n,): score of the answer served, cost of all stages, who served; ``ran`` (n, k):
    which experts answered."""

    score: FloatArray
    cost: FloatArray
    served: IntArray
    ran: NDArray[np.bool_]

    @property
    def stages(self) -> IntArray:
        """How many answered, (n,)."""
        return np.asarray(self.ran.sum(axis=1))


def prices_of(cost: FloatArray) -> FloatArray:
    """Prices of a unit of cost, falling, from far too dear to next to nothing; ``cost`` (n, k)."""
    unit = float(cost.mean()) or 1.0  # where nothing costs anything, no price matters
    prices: FloatArray = np.geomspace(3.0, 1e-4, _PRICES) / unit
    return prices


def replay(
    recorded: Recorded,
    known: Estimates,
    price: float,
    *,
    stages_max: int,
    search: Search = "greedy",
) -> Outcome:
    """Run every query at one price of a unit of cost."""
    n, k = recorded.score.shape
    paid, served = np.zeros(n), np.zeros(n, dtype=np.int64)
    ran = np.zeros((n, k), dtype=bool)
    waiting: list[tuple[str, Run, IntArray]] = [
        (name, (), rows) for name, rows in _by_category(known.categories)
    ]
    while waiting:
        name, run, rows = waiting.pop()
        joint = known.joint[name]
        quality = joint.quality(run, known.prior[rows], known.after[rows])
        most = min(stages_max, known.stages.get(name, stages_max))
        if len(run) == most:
            chosen = np.full(len(rows), STOP)
        else:
            cost = _cost_now(run, known.cost[rows], recorded.cost[rows])
            left = most - len(run)
            chosen = next_experts(joint, run, quality, cost, price, stages_left=left, search=search)
        stopped = chosen == STOP
        ended = rows[stopped]
        if len(ended):
            columns = np.array(run)
            served[ended] = columns[quality[stopped][:, columns].argmax(axis=1)]
            ran[np.ix_(ended, columns)] = True
        for expert in np.unique(chosen[~stopped]):
            going = rows[chosen == expert]
            paid[going] += recorded.cost[going, expert]
            waiting.append((name, tuple(sorted((*run, int(expert)))), going))
    return Outcome(recorded.score[np.arange(n), served], paid, served, ran)


def _cost_now(run: Run, expected: FloatArray, true: FloatArray) -> FloatArray:
    """Expected costs, scaled by how dear this query has proved with the experts already run."""
    if not run:
        return expected
    columns = list(run)
    ratio = true[:, columns].sum(axis=1) / np.maximum(expected[:, columns].sum(axis=1), 1e-300)
    return np.asarray(expected * np.clip(ratio, 0.25, 4.0)[:, None])


def _by_category(categories: Sequence[str]) -> Iterator[tuple[str, IntArray]]:
    names = np.asarray(categories)
    for name in sorted(set(categories)):
        yield name, np.flatnonzero(names == name).astype(np.int64)
