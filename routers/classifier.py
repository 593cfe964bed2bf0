"""Step one of the Composition-of-Experts router: unit vectors to a gated, calibrated posterior.

kNN over labelled prompts with cosine weights and entropy-based doubt follow the published
descriptions of CoE (arXiv 2412.01868, 2506.16655); the linear head, the blend, the temperature
(Guo et al., "On Calibration of Modern Neural Networks", 2017, section 4.2) and the similarity gate
are additions, each fitted on out-of-fold data by ``routers.fit``. Only numpy is needed to decide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from routers.embedder import Float32Array
from routers.novelty import Novelty, rescaled
from routers.types import GENERAL, Classification

__all__ = [
    "Float64Array",
    "Gates",
    "LinearHead",
    "Mixing",
    "References",
    "RouterModel",
    "blended",
    "knn_posterior",
    "least_support",
    "normalised_entropy",
    "softmax",
]

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

_SMOOTHING: Final = 1e-3  # share of the uniform distribution in the kNN vote: no log of zero


@dataclass(frozen=True, slots=True)
class References:
    """The labelled prompts that vote. ``vectors`` [n, d] unit rows, ``labels`` [n] category index.

    Kept as float16: half the artifact, and far below the spread of cosines between prompts.
    """

    vectors: NDArray[np.float16]
    labels: IntArray


@dataclass(frozen=True, slots=True)
class LinearHead:
    """Multinomial logistic regression: softmax(e @ weights + bias); [d, c] and [c]."""

    weights: Float32Array
    bias: Float32Array


@dataclass(frozen=True, slots=True)
class Mixing:
    """``knn_share`` of the neighbours' vote, the rest the head's, then tempered."""

    neighbours: int
    knn_share: float
    temperature: float


@dataclass(frozen=True, slots=True)
class Gates:
    """Above ``entropy_max`` or below ``similarity_min`` a query is ``general``.

    So is one whose category falls below ``ablation_min`` when the text loses its head or its tail:
    a few words at one end must not decide alone (after the ablation checks proposed against
    "Rerouting LLM Routers", arXiv 2501.01818). 0 turns that gate off. ``novelty``, where training
    had out-of-scope prompts, gives ``general`` its share and a gate of its own.
    """

    entropy_max: float
    similarity_min: float
    ablation_min: float = 0.0
    novelty: Novelty | None = None


class RouterModel:
    """A fitted classifier. Immutable and free of I/O, so any thread may use it."""

    def __init__(
        self,
        categories: Sequence[str],
        references: References,
        head: LinearHead,
        mixing: Mixing,
        gates: Gates,
    ) -> None:
        self.trained_categories = tuple(categories)
        self.references = references
        self.head = head
        self.mixing = mixing
        self.gates = gates
        self._vectors = np.ascontiguousarray(references.vectors, dtype=np.float32)

    @property
    def categories(self) -> tuple[str, ...]:
        """Every category a decision can name: the trained ones, and always ``general``."""
        extra = () if GENERAL in self.trained_categories else (GENERAL,)
        return self.trained_categories + extra

    def posterior(self, embeddings: Float32Array) -> tuple[Float64Array, Float64Array]:
        """[n, d] unit rows to the posterior [n, c] and the largest cosine [n]."""
        return self.posterior_given(embeddings, self.cosines(embeddings))

    def cosines(self, embeddings: Float32Array) -> Float32Array:
        """[n, d] unit rows to their cosines [n, m] with the references."""
        result: Float32Array = embeddings @ self._vectors.T
        return result

    def posterior_given(
        self, embeddings: Float32Array, cosines: Float32Array
    ) -> tuple[Float64Array, Float64Array]:
        """``posterior``, where the cosines are known already."""
        votes, nearest = knn_posterior(
            cosines,
            self.references.labels,
            len(self.trained_categories),
            self.mixing.neighbours,
        )
        linear = softmax(embeddings @ self.head.weights + self.head.bias)
        return blended(votes, linear, self.mixing), nearest

    def classify(
        self, embeddings: Float32Array, ablated: Float32Array | None = None
    ) -> list[Classification]:
        """Decide for [n, d] unit rows, and [n, 2, d] of the same texts without head and tail.

        Without ``ablated`` the ablation gate stays open: the embedder offers none.
        """
        return self.decide(*self.posterior(embeddings), ablated)

    def decide(
        self,
        posterior: Float64Array,
        nearest: Float64Array,
        ablated: Float32Array | None = None,
    ) -> list[Classification]:
        """Gate posteriors [n, c], given the largest cosines [n]; ``ablated`` as in ``classify``."""
        entropy = normalised_entropy(posterior)
        support = self.support(posterior, ablated)
        if (novelty := self.gates.novelty) is not None and len(posterior):
            names = self.trained_categories
            posterior = rescaled(posterior, novelty.share(posterior, nearest, names), names)
        return [
            self._decide(row, float(h), float(s), float(a))
            for row, h, s, a in zip(posterior, entropy, nearest, support, strict=True)
        ]

    def support(self, posterior: Float64Array, ablated: Float32Array | None) -> Float64Array:
        """[n]: the least that the most likely category keeps when either end is left out."""
        if ablated is None or not len(posterior):
            return np.ones(len(posterior))
        shortened, _ = self.posterior(ablated.reshape(-1, ablated.shape[-1]))
        return least_support(posterior, shortened)

    def _decide(
        self, posterior: Float64Array, entropy: float, similarity: float, support: float
    ) -> Classification:
        best = self.trained_categories[int(posterior.argmax())]
        shares = dict(zip(self.trained_categories, map(float, posterior), strict=True))
        shares.setdefault(GENERAL, 0.0)
        gate = gate_of(entropy, similarity, self.gates)
        if gate is None and best != GENERAL:
            gate = _stopped(shares[GENERAL], support, self.gates)
        return Classification(
            category=GENERAL if gate else best,
            best_guess=best,
            posterior=shares,
            entropy=entropy,
            similarity=similarity,
            gate=gate,
        )


def gate_of(entropy: float, similarity: float, gates: Gates) -> str | None:
    """The gate that sends a query to ``general``; "similarity" first: it needs no posterior."""
    if similarity < gates.similarity_min:
        return "similarity"
    return "entropy" if entropy > gates.entropy_max else None


def _stopped(general: float, support: float, gates: Gates) -> str | None:
    """The gate that sends a specialist's query to ``general``, if any."""
    if gates.novelty is not None and general > gates.novelty.share_max:
        return "novelty"
    return "ablation" if support < gates.ablation_min else None


def least_support(posterior: Float64Array, shortened: Float64Array) -> Float64Array:
    """[n, c] and [2n, c], two rows a text, to the smaller share [n] of each row's best category."""
    best = posterior.argmax(axis=1)
    shares = shortened.reshape(len(posterior), 2, -1)
    least: Float64Array = shares[np.arange(len(best)), :, best].min(axis=1)
    return least


def knn_posterior(
    cosines: NDArray[np.floating], labels: IntArray, category_count: int, neighbours: int
) -> tuple[Float64Array, Float64Array]:
    """Votes [n, c] of the nearest references, weighted by max(0, cosine), and the best cosine [n].

    ``cosines`` is [n, m]; fewer than ``neighbours`` references all vote. A query with no positive
    cosine gets the uniform vote.
    """
    k = min(neighbours, cosines.shape[1])
    # A partial sort alone leaves ties at the boundary to chance of layout; they weigh the same,
    # and the sum over categories is taken in index order, so the answer is deterministic.
    top = np.sort(np.argpartition(-cosines, k - 1, axis=1)[:, :k], axis=1)
    near = np.take_along_axis(cosines, top, axis=1).astype(np.float64)
    weights = np.maximum(near, 0.0)
    votes = np.zeros((cosines.shape[0], category_count))
    np.add.at(votes, (np.arange(len(votes))[:, None], labels[top]), weights)
    total = votes.sum(axis=1, keepdims=True)
    uniform = 1.0 / category_count
    shares = np.divide(votes, total, out=np.full_like(votes, uniform), where=total > 0)
    return (1 - _SMOOTHING) * shares + _SMOOTHING * uniform, near.max(axis=1)


def softmax(logits: NDArray[np.floating]) -> Float64Array:
    """Row-wise, in float64, safe for large logits."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exp = np.exp(shifted)
    result: Float64Array = exp / exp.sum(axis=1, keepdims=True)
    return result


def blended(votes: Float64Array, linear: Float64Array, mixing: Mixing) -> Float64Array:
    """Mix two posteriors [n, c] and temper the mixture: p^(1/T), normalised."""
    mixed = mixing.knn_share * votes + (1.0 - mixing.knn_share) * linear
    return softmax(np.log(np.maximum(mixed, 1e-12)) / mixing.temperature)


def normalised_entropy(posterior: Float64Array) -> Float64Array:
    """Shannon entropy of rows [n, c], divided by ln c: 0 is certain, 1 knows nothing."""
    safe = np.where(posterior > 0, posterior, 1.0)
    entropy: Float64Array = -(posterior * np.log(safe)).sum(axis=1) / math.log(posterior.shape[1])
    return np.clip(entropy, 0.0, 1.0)
