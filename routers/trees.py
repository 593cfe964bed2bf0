"""Boosted regression trees as plain arrays: fitted by scikit-learn, walked by numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Trees", "fit_trees"]

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

_ROUNDS: Final = 150
_LEARNING_RATE: Final = 0.04
_LEAVES: Final = 8
_LEAF_ROWS_MIN: Final = 40
_SHRINKAGE: Final = 10.0
_FEATURE_SHARE: Final = 0.3


@dataclass(frozen=True, slots=True)
class Trees:
    """k boosted sums of t trees. Arrays are [k, t, nodes]; node 0 is a root.

    ``feature`` is -1 at a leaf, where ``value`` counts; else a row goes ``left`` when its feature
    is at most ``threshold``, ``right`` when not. ``start`` [k] is what the trees are added to.
    Raises ValueError for a node that leads nowhere, or back: a walk over such nodes has no end.
    """

    feature: NDArray[np.int16]
    threshold: NDArray[np.float32]
    left: NDArray[np.int16]
    right: NDArray[np.int16]
    value: NDArray[np.float32]
    start: NDArray[np.float32]

    def __post_init__(self) -> None:
        each = (self.feature, self.threshold, self.left, self.right, self.value)
        if len({x.shape for x in each}) > 1:
            raise ValueError("the arrays of the trees' nodes differ in length")
        inner = self.feature >= 0
        node = np.nonzero(inner)[2]
        ways = np.stack([self.left[inner], self.right[inner]])
        if not ((ways > node).all() and (ways < self.feature.shape[2]).all()):
            raise ValueError("trees have a node that leads nowhere or back")

    def predict(self, rows: NDArray[np.float32]) -> Float64Array:
        """[n, p] float32 features to [n, k]. Row by row: a request is one row."""
        targets, trees, nodes = self.feature.shape
        first = np.arange(targets * trees) * nodes
        feature, threshold = self.feature.ravel(), self.threshold.ravel()
        children = np.stack([self.right.ravel(), self.left.ravel()])
        out = np.empty((len(rows), targets))
        for i, row in enumerate(rows):
            at = first.copy()
            while len(walking := np.flatnonzero(feature[at] >= 0)):
                here = at[walking]
                goes_left = (row[feature[here]] <= threshold[here]).astype(np.int64)
                at[walking] = first[walking] + children[goes_left, here]
            out[i] = self.value.ravel()[at].reshape(targets, trees).sum(axis=1)
        return out + self.start


def fit_trees(rows: NDArray[np.float32], targets: Float64Array, seed: int) -> Trees:
    """Fit targets [n, k] from features [n, p], each column on its own.

    Small leaves are forbidden, steps are short and every split sees a third of the features: with
    0/1 outcomes nearly all of the variance is noise.
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    fitted: list[Any] = []
    for column in range(targets.shape[1]):
        model = HistGradientBoostingRegressor(
            max_iter=_ROUNDS,
            learning_rate=_LEARNING_RATE,
            max_leaf_nodes=_LEAVES,
            min_samples_leaf=min(_LEAF_ROWS_MIN, max(5, len(rows) // 20)),
            l2_regularization=_SHRINKAGE,
            max_features=_FEATURE_SHARE,
            early_stopping=False,
            random_state=seed,
        )
        fitted.append(model.fit(rows, targets[:, column]))
    return _as_arrays(fitted)


def _as_arrays(models: list[Any]) -> Trees:
    nodes_max = max(len(p[0].nodes) for model in models for p in model._predictors)
    shape = (len(models), _ROUNDS, nodes_max)
    trees = Trees(
        feature=np.full(shape, -1, np.int16),
        threshold=np.zeros(shape, np.float32),
        left=np.zeros(shape, np.int16),
        right=np.zeros(shape, np.int16),
        value=np.zeros(shape, np.float32),
        start=np.array([float(np.ravel(m._baseline_prediction)[0]) for m in models], np.float32),
    )
    for k, model in enumerate(models):
        for t, (predictor,) in enumerate(model._predictors):
            nodes = predictor.nodes
            at = (k, t, slice(0, len(nodes)))
            leaf = nodes["is_leaf"].astype(bool)
            trees.feature[at] = np.where(leaf, -1, nodes["feature_idx"])
            trees.threshold[at] = np.where(leaf, 0.0, nodes["num_threshold"])
            trees.left[at], trees.right[at] = nodes["left"], nodes["right"]
            trees.value[at] = np.where(leaf, nodes["value"], 0.0)
    return trees
