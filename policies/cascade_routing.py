"""Cascade routing: after every answer, run which expert next, or stop? Pure.

Dekoninck, Baader, Vechev, "A Unified Approach to Routing and Cascading for LLMs" (2410.10347,
ICML 2025). At each step the estimates of all experts are brought up to date with the answers seen,
and the step with the best value in quality minus price times further cost is taken; money spent is
sunk. Plain routing is the case that stops after one answer; a threshold cascade the case that can
only go on to the next expert of a chain and stops at a quality of 1 - price.

Two searches:

- "greedy", the default, looks one answer ahead. Running m moves every estimate along a line in the
  one unknown, m's news e ~ N(0, 1); afterwards the better of stopping and of one more expert is
  taken, so its value is the expected maximum of lines. The paper's value of a set pays for all of
  it; here the second expert is paid for only where m's answer turns out to call for it.
- "full" searches sets of experts as the paper does, E[max] of a set under the correlated errors,
  with its lemma 1 to prune, and values no option to stop within the set.
"""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from policies.full_search import full_values
from policies.joint_estimates import JointEstimates, Run
from policies.post_answer import FloatArray

__all__ = ["STOP", "Search", "greedy_values", "next_experts"]

Search: TypeAlias = Literal["greedy", "full"]
IntArray: TypeAlias = NDArray[np.int64]

STOP: Final = -1
_NODES = 16
_TIE = 1e-8  # the paper's rounding of trade-offs


def _normal_nodes(count: int) -> FloatArray:
    """Means of ``count`` equally likely slices of the standard normal distribution."""
    from scipy.stats import norm

    edges = norm.ppf(np.linspace(0.0, 1.0, count + 1))
    density = norm.pdf(edges)
    return np.asarray((density[:-1] - density[1:]) * count, dtype=np.float64)


_EPSILON: Final = _normal_nodes(_NODES)


def greedy_values(
    joint: JointEstimates,
    run: Run,
    quality: FloatArray,
    cost: FloatArray,
    price: float,
    *,
    stages_left: int,
) -> FloatArray:
    """(n, k) values of running each expert next; -inf for those that have run.

    ``quality`` and ``cost`` (n, k) are the estimates at hand. Value of stopping, to compare with:
    the best quality among ``run``.
    """
    n, k = quality.shape
    moves = joint.moves(run, quality)
    asking = price * cost
    asking[:, list(run)] = 0.0
    values = np.full((n, k), -np.inf)
    for expert in range(k):
        if expert in run:
            continue
        level = quality - (asking if stages_left > 1 else _barred(run, asking))
        level[:, expert] = quality[:, expert]
        lines = level[:, :, None] + moves[:, expert, :, None] * _EPSILON
        values[:, expert] = lines.max(axis=1).mean(axis=1) - asking[:, expert]
    return values


def next_experts(
    joint: JointEstimates,
    run: Run,
    quality: FloatArray,
    cost: FloatArray,
    price: float,
    *,
    stages_left: int,
    search: Search = "greedy",
    seed: int = 0,
) -> IntArray:
    """For each of n queries with the same run set: the next expert's position, or STOP.

    quality, cost: (n, k) as they stand. Ties go to stopping, then to the cheaper expert. ``seed``
    draws the sample of the full search; the greedy one has none. With no stage left, and an answer
    at hand, the answer is STOP.
    """
    if run and stages_left <= 0:
        return np.full(len(quality), STOP, dtype=np.int64)
    if search == "full":
        values = full_values(joint, run, quality, cost, price, stages_left=stages_left, seed=seed)
    else:
        values = greedy_values(joint, run, quality, cost, price, stages_left=stages_left)
    values = values - _TIE * cost / np.maximum(cost.max(), 1e-300)
    best = values.argmax(axis=1)
    if not run:
        return np.asarray(best, dtype=np.int64)
    stop = quality[:, list(run)].max(axis=1)
    gain = values[np.arange(len(best)), best] - stop
    return np.asarray(np.where(gain > _TIE, best, STOP), dtype=np.int64)


def _barred(run: Run, asking: FloatArray) -> FloatArray:
    """No price is high enough for an expert that may not run any more."""
    barred = np.full_like(asking, np.inf)
    barred[:, list(run)] = 0.0
    return barred
