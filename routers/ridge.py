"""Ridge regression of many targets on word pairs, embedding and signs at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from routers.features import HashedText, Vocabulary

__all__ = ["DenseScale", "Design", "design", "fit_dense_scale", "ridge"]

Float64Array = NDArray[np.float64]
Float32Array = NDArray[np.float32]

_TOLERANCE: Final = 1e-2
_STEPS_MAX: Final = 40
_COLUMNS_AT_ONCE: Final = 16  # so that the weights being read stay in the processor's cache
_SIGN_WEIGHT: Final = 0.1
_SIGN_LIMIT: Final = 4.0


@dataclass(frozen=True, slots=True)
class DenseScale:
    """Brings signs to a comparable scale: (signs - ``mean``) / ``spread``, cut at ±4, times 0.1.

    The text's n-gram row and its embedding have length 1; 23 signs at 0.1 have about half of that.
    A sign far outside what training saw counts as its limit, so that no prompt can shout.
    """

    mean: Float64Array
    spread: Float64Array

    def dense(self, embeddings: NDArray[Any], signs: Float64Array) -> Float32Array:
        """[n, d] and [n, p] to [n, d + p]."""
        return np.hstack([embeddings, self.scaled(signs)]).astype(np.float32)

    def scaled(self, signs: Float64Array) -> Float64Array:
        units = np.clip((signs - self.mean) / self.spread, -_SIGN_LIMIT, _SIGN_LIMIT)
        result: Float64Array = units * _SIGN_WEIGHT
        return result


def fit_dense_scale(signs: Float64Array) -> DenseScale:
    """Mean and spread of each sign over [n, p]; a sign that never varies counts as 0."""
    spread = signs.std(axis=0)
    return DenseScale(signs.mean(axis=0), np.where(spread > 1e-9, spread, np.inf))


@dataclass(frozen=True, slots=True)
class Design:
    """n rows: sparse TF-IDF [n, v], also transposed, and dense columns [n, d + p]."""

    text: Any  # scipy.sparse.csr_matrix
    text_transposed: Any  # [v, n], csr as well: either product then reads row by row
    dense: Float32Array

    def times(self, weights: Float32Array) -> Float32Array:
        v = self.text.shape[1]
        result: Float32Array = self.text @ weights[:v] + self.dense @ weights[v:]
        return result

    def transposed_times(self, rows: Float32Array) -> Float32Array:
        parts = [self.text_transposed @ rows, self.dense.T @ rows]
        result: Float32Array = np.concatenate(parts).astype(np.float32)
        return result


def design(vocabulary: Vocabulary, texts: Sequence[HashedText], dense: Float32Array) -> Design:
    from scipy.sparse import csr_matrix

    weighed = [vocabulary.weigh(text) for text in texts]
    starts = np.cumsum([0, *(len(columns) for columns, _ in weighed)])
    columns = np.concatenate([columns for columns, _ in weighed])
    values = np.concatenate([values for _, values in weighed]).astype(np.float32)
    shape = (len(texts), len(vocabulary.ids))
    text = csr_matrix((values, columns, starts), shape=shape)
    return Design(text, text.T.tocsr(), dense)


def ridge(
    rows: Design, targets: Float64Array, penalties: Float64Array
) -> tuple[Float32Array, Float64Array]:
    """Weights [v + d + p, t] and intercepts [t] that minimise |Xw + b - y|² + penalty·|w|².

    ``targets`` [n, t], ``penalties`` [t]. Conjugate gradients on the normal equations, some targets
    at a time; columns are centred without filling the sparse block.
    """
    parts = [
        _solved(rows, targets[:, at : at + _COLUMNS_AT_ONCE], penalties[at : at + _COLUMNS_AT_ONCE])
        for at in range(0, targets.shape[1], _COLUMNS_AT_ONCE)
    ]
    return (
        np.concatenate([weights for weights, _ in parts], axis=1),
        np.concatenate([bias for _, bias in parts]),
    )


def _solved(
    rows: Design, targets: Float64Array, penalties: Float64Array
) -> tuple[Float32Array, Float64Array]:
    n = len(targets)
    means = rows.transposed_times(np.full((n, 1), 1.0 / n, np.float32))
    centre = targets.mean(axis=0)
    rest = (targets - centre).astype(np.float32)
    penalty = penalties.astype(np.float32)

    def normal(w: Float32Array) -> Float32Array:
        image = rows.times(w) - means.T @ w
        back = rows.transposed_times(image) - means * image.sum(axis=0)
        result: Float32Array = back + penalty * w
        return result

    wanted = rows.transposed_times(rest) - means * rest.sum(axis=0)
    weights = np.zeros_like(wanted)
    residual, direction = wanted.copy(), wanted.copy()
    size = (residual**2).sum(axis=0)
    enough = _TOLERANCE**2 * np.maximum(size, 1e-20)
    for _ in range(_STEPS_MAX):
        if (size <= enough).all():
            break
        moved = normal(direction)
        step = size / np.maximum((direction * moved).sum(axis=0), 1e-20)
        weights += step * direction
        residual -= step * moved
        before, size = size, (residual**2).sum(axis=0)
        direction = residual + (size / np.maximum(before, 1e-20)) * direction
    return weights, centre - (means.T @ weights)[0]
