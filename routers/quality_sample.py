"""What estimates are fitted on: embedded rows with outcomes, settings, and folds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from routers.features import HashedText

__all__ = ["OutcomeSample", "QualitySettings", "folds_of"]

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class QualitySettings:
    """How much is searched. ``table_pseudo_counts``: how strongly small cells may be shrunk; the
    best of them by leave-one-out is used, apart for categories and for topics within them."""

    folds: int = 5
    neighbours: int = 150
    clusters_max: int = 48
    table_pseudo_counts: tuple[float, ...] = (5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
    cluster_pseudo_counts: float = 20.0
    blend: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    penalty: float = 40.0
    denoised_penalty: float = 1.0
    residual_penalty: float = 100.0
    topic_penalty: float = 0.3
    embedding_components: int = 16
    text_components: int = 24
    stacking_ridge: float = 0.02


@dataclass(frozen=True, slots=True)
class OutcomeSample:
    """Embedded rows with outcomes.

    ``vectors`` [n, d] unit rows, ``texts`` hashed, ``signs`` [n, p], ``labels`` [n] topic index,
    ``parent`` [t] each topic's category, ``groups`` [n] that no split may part, ``score`` and
    ``cost`` [n, k]. ``references`` [m]: the rows that the router keeps as neighbours.
    """

    vectors: NDArray[np.float16]
    texts: tuple[HashedText, ...]
    signs: Float64Array
    labels: IntArray
    groups: IntArray
    parent: IntArray
    experts: tuple[str, ...]
    score: Float64Array
    cost: Float64Array
    references: IntArray

    def rows(self, index: IntArray) -> OutcomeSample:
        return replace(
            self,
            vectors=self.vectors[index],
            texts=tuple(self.texts[i] for i in index),
            signs=self.signs[index],
            labels=self.labels[index],
            groups=self.groups[index],
            score=self.score[index],
            cost=self.cost[index],
            references=np.arange(len(index)),
        )


def folds_of(groups: IntArray, folds: int, seed: int) -> Iterator[tuple[IntArray, IntArray]]:
    """Rows in and out of each fold; equal groups stay together."""
    fold_of_group = np.random.default_rng(seed).permutation(int(groups.max()) + 1) % folds
    fold = fold_of_group[groups]
    for f in range(folds):
        yield np.flatnonzero(fold != f), np.flatnonzero(fold == f)
