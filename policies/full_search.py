"""The paper's search over sets of experts (Dekoninck et al., 2410.10347, sections 3 and 4). Pure.

A set's value is the expected best quality in it, less the price of its experts that have not run.
Errors are correlated: the estimates of a set move together with the covariance of what its answers
will tell. The expectation is taken over a scrambled Sobol sample, the same one for every set, so
equal seeds give equal choices.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from policies.joint_estimates import JointEstimates, Run
from policies.post_answer import FloatArray

__all__ = ["expected_best", "full_values"]

IntArray = NDArray[np.int64]

_SAMPLES = 128  # a power of two keeps a Sobol sample balanced
_EIGENVALUE_MIN = 1e-12


def expected_best(mean: FloatArray, covariance: FloatArray, *, seed: int = 0) -> FloatArray:
    """E[max] (n,) of normal variables with means (n, s) and one covariance (s, s).

    Singular covariances are taken as they are: variables without variance are constants.
    """
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2.0)
    kept = values > _EIGENVALUE_MIN
    if not kept.any():
        return np.asarray(mean.max(axis=1))
    root = vectors[:, kept] * np.sqrt(values[kept])
    draws = _normal_draws(int(kept.sum()), seed) @ root.T
    return np.asarray((mean[:, None, :] + draws[None, :, :]).max(axis=2).mean(axis=1))


@lru_cache(maxsize=64)
def _normal_draws(dimensions: int, seed: int) -> FloatArray:
    """(samples, dimensions), mirrored, so that their mean is exactly 0."""
    from scipy.stats import norm, qmc

    points = qmc.Sobol(dimensions, scramble=True, seed=seed).random(_SAMPLES // 2)
    half = norm.ppf(np.clip(points, 1e-9, 1.0 - 1e-9))
    return np.concatenate([half, -half])


class _Exploration:
    """Depth-first over sets in a fixed order; ``values`` keeps the best set each expert is in."""

    def __init__(
        self,
        joint: JointEstimates,
        run: Run,
        quality: FloatArray,
        asking: FloatArray,
        experts_max: int,
        seed: int,
    ) -> None:
        self._joint, self._run, self._seed = joint, run, seed
        self._quality, self._asking = quality, asking
        self._experts_max = experts_max
        n, k = quality.shape
        self._first = asking.argsort(axis=1, kind="stable").argsort(axis=1)  # rank by cost
        self.values = np.full((n, k), -np.inf)

    def explore(self, chosen: Run, rows: IntArray, parent: FloatArray | None) -> None:
        """Extend ``chosen`` by every later expert, for the rows where it is still worth it."""
        start = chosen[-1] + 1 if chosen else 0
        for expert in range(start, self._quality.shape[1]):
            if expert in self._run:
                continue
            wider = (*chosen, expert)
            value = self._value(wider, rows)
            going = np.ones(len(rows), dtype=bool)
            if parent is not None:  # lemma 1: what does not pay now pays in no larger set
                going = value - parent >= self._asking[rows, expert]
            if going.any():
                self._keep(wider, rows[going], value[going])
                if len(wider) < self._experts_max:
                    self.explore(wider, rows[going], value[going])

    def _value(self, chosen: Run, rows: IntArray) -> FloatArray:
        members = np.array([*self._run, *chosen], dtype=np.int64)
        covariance = self._joint.covariance(self._run, chosen)[np.ix_(members, members)]
        return expected_best(self._quality[np.ix_(rows, members)], covariance, seed=self._seed)

    def _keep(self, chosen: Run, rows: IntArray, value: FloatArray) -> None:
        """The set's trade-off counts for the expert of it that would run first: the cheapest."""
        columns = np.array(chosen, dtype=np.int64)
        gain = value - self._asking[np.ix_(rows, columns)].sum(axis=1)
        first = columns[self._first[np.ix_(rows, columns)].argmin(axis=1)]
        self.values[rows, first] = np.maximum(self.values[rows, first], gain)


def full_values(
    joint: JointEstimates,
    run: Run,
    quality: FloatArray,
    cost: FloatArray,
    price: float,
    *,
    stages_left: int,
    seed: int = 0,
) -> FloatArray:
    """(n, k) best trade-off of a set that each expert would begin; -inf for those that have run."""
    rows = np.arange(len(quality), dtype=np.int64)
    exploration = _Exploration(joint, run, quality, price * cost, stages_left, seed)
    parent = quality[:, list(run)].max(axis=1) if run else None
    exploration.explore((), rows, parent)
    return exploration.values
