"""Extremely randomised trees as plain arrays: grown by scikit-learn, walked by numpy.

Geurts, Ernst, Wehenkel, "Extremely randomized trees" (Machine Learning 63, 2006). One forest for
all experts: a split has to help their outcomes together, so that what is the noise of one answer
moves it little, and averaging over random thresholds leaves a smooth, adaptive neighbourhood.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["Forest", "fit_forest"]

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

_TREES: Final = 150
_LEAF_ROWS_MIN: Final = 8
_LEAVES_MAX: Final = 2_000  # of a tree: bounds the artifact, whatever the number of rows
_FEATURE_SHARE: Final = 0.3
_ROWS_AT_ONCE: Final = 2_000


@dataclass(frozen=True, slots=True)
class Forest:
    """The nodes of all trees, one after the other; ``root`` [t] is where each tree begins.

    ``feature`` [n] is -1 at a leaf; else a row goes to node ``left`` when its feature is at most
    ``threshold``, to ``right`` when not. A leaf's ``left`` is its row of ``value`` [l, k].
    Raises ValueError for a node that leads nowhere, or back: a walk over such nodes has no end.
    """

    root: NDArray[np.int32]
    feature: NDArray[np.int16]
    threshold: NDArray[np.float32]
    left: NDArray[np.int32]
    right: NDArray[np.int32]
    value: NDArray[np.float16]

    def __post_init__(self) -> None:
        if len({x.shape for x in (self.feature, self.threshold, self.left, self.right)}) > 1:
            raise ValueError("the arrays of the forest's nodes differ in length")
        nodes, inner = np.arange(len(self.feature)), self.feature >= 0
        ways = np.stack([self.left[inner], self.right[inner]])
        leads_on = (ways > nodes[inner]).all() and (ways < len(nodes)).all()
        if not (leads_on and _within(self.left[~inner], self.value) and _within(self.root, nodes)):
            raise ValueError("forest has a node that leads nowhere or back")

    def predict(self, rows: NDArray[np.floating]) -> Float64Array:
        """[n, p] features, read as float32, to [n, k]: the mean over trees."""
        rows = rows.astype(np.float32)
        parts = [
            self._predict(rows[start : start + _ROWS_AT_ONCE])
            for start in range(0, len(rows), _ROWS_AT_ONCE)
        ]
        return np.concatenate(parts) if parts else np.empty((0, self.value.shape[1]))

    def _predict(self, rows: NDArray[np.float32]) -> Float64Array:
        at = np.tile(self.root, (len(rows), 1))
        row = np.arange(len(rows))[:, None]
        while ((feature := self.feature[at]) >= 0).any():
            low = rows[row, feature] <= self.threshold[at]
            below = np.where(low, self.left[at], self.right[at])
            at = np.where(feature >= 0, below, at)
        mean: Float64Array = self.value[self.left[at]].mean(axis=1, dtype=np.float64)
        return mean


def _within(index: NDArray[np.int32], rows: NDArray[Any]) -> bool:
    return bool(((index >= 0) & (index < len(rows))).all())


def fit_forest(rows: NDArray[np.floating], targets: Float64Array, seed: int) -> Forest:
    """Fit targets [n, k] from features [n, p], all columns by the same splits."""
    from sklearn.ensemble import ExtraTreesRegressor

    grown = ExtraTreesRegressor(
        n_estimators=_TREES,
        min_samples_leaf=max(_LEAF_ROWS_MIN, len(rows) // _LEAVES_MAX),
        max_features=_FEATURE_SHARE,
        random_state=seed,
    ).fit(rows.astype(np.float32), targets)
    return _as_arrays([one.tree_ for one in grown.estimators_], targets.shape[1])


def _as_arrays(trees: list[Any], targets: int) -> Forest:
    root, nodes, leaves = [], 0, 0
    columns: dict[str, list[NDArray[Any]]] = {name: [] for name in Forest.__slots__[1:]}
    for tree in trees:
        is_leaf = tree.children_left < 0
        root.append(nodes)
        row = leaves + np.cumsum(is_leaf) - 1
        columns["feature"].append(np.where(is_leaf, -1, tree.feature))
        columns["threshold"].append(np.where(is_leaf, 0.0, _as_low(tree.threshold)))
        columns["left"].append(np.where(is_leaf, row, nodes + tree.children_left))
        columns["right"].append(np.where(is_leaf, 0, nodes + tree.children_right))
        columns["value"].append(tree.value.reshape(len(is_leaf), targets)[is_leaf])
        nodes, leaves = nodes + len(is_leaf), leaves + int(is_leaf.sum())
    joined = {name: np.concatenate(parts) for name, parts in columns.items()}
    return Forest(
        root=np.array(root, np.int32),
        feature=joined["feature"].astype(np.int16),
        threshold=joined["threshold"].astype(np.float32),
        left=joined["left"].astype(np.int32),
        right=joined["right"].astype(np.int32),
        value=joined["value"].astype(np.float16),
    )


def _as_low(threshold: Float64Array) -> NDArray[np.float32]:
    """The largest float32 not above it: a float32 feature then falls on the same side."""
    near = threshold.astype(np.float32)
    return np.where(near > threshold, np.nextafter(near, np.float32(-np.inf)), near)
