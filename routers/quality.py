"""Step two's estimates: how good each expert's answer to this query would be, before asking.

Seven opinions are added with weights fitted on out-of-fold rows: the category's quality table under
the posterior, neighbours' outcomes, clusters' outcomes (UniRoute, arXiv 2502.08773; Avengers-Pro,
arXiv 2508.12631), two linear maps of word pairs, embedding and signs, boosted trees on signs and
principal components, and a forest on these and the posterior. Only numpy is needed to estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from routers.classifier import softmax
from routers.features import Vocabulary, hashed, signs
from routers.forest import Forest
from routers.ridge import DenseScale
from routers.trees import Trees

__all__ = [
    "COMPONENTS",
    "Added",
    "Clusters",
    "Costs",
    "Linear",
    "Neighbours",
    "Projection",
    "QualityModel",
    "Recalibration",
    "TextFeatures",
    "Topics",
    "blended_topics",
    "cluster_means",
    "contrasts",
    "neighbour_means",
    "text_features",
]

Float64Array = NDArray[np.float64]
Float32Array = NDArray[np.float32]
IntArray = NDArray[np.int64]

COMPONENTS: Final = ("table", "neighbours", "clusters", "linear", "denoised", "trees", "forest")
_SHARPNESS: Final = 10.0  # weight of a neighbour or cluster: exp(10·cosine)
_PSEUDO_COUNTS: Final = 10.0
_CLUSTERS_NEAR: Final = 3
_POSTERIOR_FLOOR: Final = 1e-4


@dataclass(frozen=True, slots=True)
class TextFeatures:
    """Of n routing texts: ``signs`` [n, p], and per text its known columns and TF-IDF weights."""

    signs: Float64Array
    columns: tuple[IntArray, ...]
    weights: tuple[Float32Array, ...]


def text_features(texts: Sequence[str], vocabulary: Vocabulary) -> TextFeatures:
    """Everything but the embedding that an estimate is made from."""
    weighed = [vocabulary.weigh(hashed(text)) for text in texts]
    return TextFeatures(
        np.array([signs(text) for text in texts]),
        tuple(columns for columns, _ in weighed),
        tuple(weights for _, weights in weighed),
    )


@dataclass(frozen=True, slots=True)
class Projection:
    """Principal components: of embeddings [d, a] and of TF-IDF rows [v, b], for all trees."""

    embedding: Float32Array
    text: Float32Array

    def rows(self, embeddings: Float32Array, text: TextFeatures) -> Float32Array:
        """[n, p + a + b]: signs and components."""
        topics = [w @ self.text[c] for c, w in zip(text.columns, text.weights, strict=True)]
        return np.hstack([text.signs, embeddings @ self.embedding, np.array(topics)]).astype(
            np.float32
        )


@dataclass(frozen=True, slots=True)
class Linear:
    """``text`` [v, k], ``dense`` [d + p, k] and ``bias`` [k] of one linear map."""

    text: Float32Array
    dense: Float32Array
    bias: Float64Array

    def predict(self, dense: Float32Array, text: TextFeatures) -> Float64Array:
        pairs = [w @ self.text[c] for c, w in zip(text.columns, text.weights, strict=True)]
        result: Float64Array = np.array(pairs) + dense @ self.dense + self.bias
        return result


@dataclass(frozen=True, slots=True)
class Topics:
    """Sharpens step one's posterior with word pairs and signs: a linear score per topic.

    A topic is a category, or a part of one that comes from one source; ``parent`` [t] is its
    category. ``text`` [v, t], ``dense`` [d + p, t] and ``bias`` [t] come from one ridge regression
    on the labels; ``strength`` and ``share`` weigh the scores and the parent's log posterior in
    the softmax.
    """

    text: NDArray[np.float16]
    dense: Float32Array
    bias: Float64Array
    parent: IntArray
    strength: float
    share: float

    def scores(self, dense: Float32Array, text: TextFeatures) -> Float64Array:
        """[n, t], about 1 for the right topic and 0 for the others."""
        pairs = [
            w @ self.text[c].astype(np.float32)
            for c, w in zip(text.columns, text.weights, strict=True)
        ]
        result: Float64Array = np.array(pairs) + dense @ self.dense + self.bias
        return result

    def posterior(
        self, dense: Float32Array, text: TextFeatures, first: Float64Array
    ) -> Float64Array:
        """[n, t], given step one's posterior [n, c]."""
        known = first[:, self.parent]
        return blended_topics(self.scores(dense, text), known, self.strength, self.share)


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Outcomes [m, k] of the training prompts whose vectors are the router's references."""

    score: NDArray[np.float16]
    count: int


@dataclass(frozen=True, slots=True)
class Clusters:
    """``centres`` [j, d] unit rows and ``means`` [j, k], each expert's mean score in a cluster."""

    centres: Float32Array
    means: Float64Array


@dataclass(frozen=True, slots=True)
class Recalibration:
    """Per expert: P = σ(slope·logit(q) + intercept) (Platt 1999); 1 and 0 leave q as it is."""

    slope: Float64Array
    intercept: Float64Array

    def apply(self, quality: Float64Array) -> Float64Array:
        inside = np.clip(quality, 0.005, 0.995)
        logit = np.log(inside / (1 - inside))
        result: Float64Array = 1 / (1 + np.exp(-(self.slope * logit + self.intercept)))
        return result


@dataclass(frozen=True, slots=True)
class Costs:
    """Cost per query and expert: exp of a linear map of embedding and signs; [d + p, k], [k].

    ``level`` [k] brings its mean to the observed one: the mean of exp is not exp of the mean.
    """

    weights: Float64Array
    bias: Float64Array
    level: Float64Array

    def predict(self, dense: Float32Array) -> Float64Array:
        result: Float64Array = self.level * np.exp(dense @ self.weights + self.bias)
        return result


@dataclass(frozen=True, slots=True)
class Added:
    """Experts that joined with a small profile set, described by those that were trained.

    q = intercept + q_trained @ ``loadings`` + posterior @ ``table``: [k, a], [a] and [c, a].
    ``cost_loadings`` [k, a] says the same of cost, without intercept.
    """

    loadings: Float64Array
    intercept: Float64Array
    table: Float64Array
    cost_loadings: Float64Array


@dataclass(frozen=True, slots=True)
class QualityModel:
    """Estimates for k ``experts``. Immutable and free of I/O.

    ``table`` [t, k] is the shrunk mean score by topic, ``mean`` [k] over all. ``mixing``
    [2, components]: weights of the opinions' departure from the mean, first for what all experts
    share (how hard the query is), second for the differences between experts. A component with two
    zero weights was not admitted, and may be None.
    """

    experts: tuple[str, ...]
    vocabulary: Vocabulary
    scale: DenseScale
    mean: Float64Array
    table: Float64Array
    topics: Topics
    linear: Linear | None
    denoised: Linear | None
    neighbours: Neighbours | None
    clusters: Clusters | None
    projection: Projection | None
    trees: Trees | None
    forest: Forest | None
    mixing: Float64Array
    recalibration: Recalibration
    costs: Costs
    added: Added | None = None

    def with_added(self, part: Added) -> QualityModel:
        """With one more expert behind those there are."""
        if self.added is None:
            return replace(self, added=part)
        joined = {
            name: np.concatenate([getattr(self.added, name), getattr(part, name)], axis=-1)
            for name in ("loadings", "intercept", "table", "cost_loadings")
        }
        return replace(self, added=Added(**joined))

    def opinions(
        self,
        embeddings: Float32Array,
        text: TextFeatures,
        posterior: Float64Array,
        cosines: NDArray[np.floating],
    ) -> dict[str, Float64Array]:
        """Each admitted component's scores [n, k].

        ``embeddings`` [n, d] unit rows, ``posterior`` [n, c], ``cosines`` [n, m] to the references.
        """
        dense = self.scale.dense(embeddings, text.signs)
        found = {"table": self.topics.posterior(dense, text, posterior) @ self.table}
        if self.neighbours is not None:
            found["neighbours"] = neighbour_means(
                cosines, self.neighbours.score, self.neighbours.count, self.mean
            )
        if self.clusters is not None:
            found["clusters"] = cluster_means(embeddings, self.clusters)
        if self.linear is not None:
            found["linear"] = self.linear.predict(dense, text)
        if self.denoised is not None:
            found["denoised"] = self.denoised.predict(dense, text)
        if self.projection is not None:
            rows = self.projection.rows(embeddings, text)
            if self.trees is not None:
                found["trees"] = joined(self.trees.predict(rows))
            if self.forest is not None:
                found["forest"] = joined(self.forest.predict(np.hstack([rows, posterior])))
        return found

    def estimate(self, opinions: dict[str, Float64Array], posterior: Float64Array) -> Float64Array:
        """[n, k + a] calibrated estimates in 0..1 from ``opinions``, the added experts last."""
        return self._with_added(self.recalibration.apply(self.mixed(opinions)), posterior)

    def mapped(self, opinions: dict[str, Float64Array], posterior: Float64Array) -> Float64Array:
        """[n, k + a] what the category map knows: the quality table under the posterior."""
        return self._with_added(opinions["table"], posterior)

    def _with_added(self, trained: Float64Array, posterior: Float64Array) -> Float64Array:
        if self.added is None:
            return trained
        joined = self.added.intercept + trained @ self.added.loadings
        return np.hstack([trained, np.clip(joined + posterior @ self.added.table, 0.0, 1.0)])

    def mixed(self, opinions: dict[str, Float64Array]) -> Float64Array:
        """The weighted sum, before calibration."""
        total = np.zeros_like(next(iter(opinions.values())))
        for name, opinion in opinions.items():
            shared, differences = contrasts(opinion - self.mean)
            weights = self.mixing[:, COMPONENTS.index(name)]
            total += weights[0] * shared + weights[1] * differences
        return np.clip(self.mean + total, 0.0, 1.0)

    def cost(self, embeddings: Float32Array, text: TextFeatures) -> Float64Array:
        """[n, k + a] expected cost in the unit of the training data."""
        trained = self.costs.predict(self.scale.dense(embeddings, text.signs))
        if self.added is None:
            return trained
        return np.hstack([trained, trained @ self.added.cost_loadings])


def blended_topics(
    scores: Float64Array, first: Float64Array, strength: float, share: float
) -> Float64Array:
    """softmax(strength·scores + share·ln first), all [n, t]."""
    return softmax(strength * scores + share * np.log(np.maximum(first, _POSTERIOR_FLOOR)))


def contrasts(scores: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Split [n, k] into the row mean [n, 1] and each expert's difference to it [n, k].

    What an expert is better at decides the route; how hard a query is does not. They carry
    different amounts of noise, so they are shrunk apart.
    """
    shared = scores.mean(axis=1, keepdims=True)
    return shared, scores - shared


def joined(parts: Float64Array) -> Float64Array:
    """Undo ``contrasts``: [n, 1 + k], the row mean first, to [n, k]."""
    whole: Float64Array = parts[:, :1] + parts[:, 1:]
    return whole


def neighbour_means(
    cosines: NDArray[np.floating], score: NDArray[np.floating], count: int, mean: Float64Array
) -> Float64Array:
    """Outcomes [m, k] of the ``count`` nearest, weighted by exp(10·cosine), pulled to ``mean``."""
    near = min(count, cosines.shape[1])
    top = np.sort(np.argpartition(-cosines, near - 1, axis=1)[:, :near], axis=1)
    closest = np.take_along_axis(cosines, top, axis=1).astype(np.float64)
    weights = np.exp(_SHARPNESS * (closest - closest.max(axis=1, keepdims=True)))
    weights /= weights.mean(axis=1, keepdims=True)
    sums = np.einsum("nm,nmk->nk", weights, score[top].astype(np.float64))
    result: Float64Array = (sums + _PSEUDO_COUNTS * mean) / (near + _PSEUDO_COUNTS)
    return result


def cluster_means(embeddings: Float32Array, clusters: Clusters) -> Float64Array:
    """Mean scores of the three nearest clusters, weighted by exp(10·cosine)."""
    cosines = (embeddings @ clusters.centres.T).astype(np.float64)
    near = min(_CLUSTERS_NEAR, cosines.shape[1])
    top = np.sort(np.argpartition(-cosines, near - 1, axis=1)[:, :near], axis=1)
    weights = np.exp(_SHARPNESS * np.take_along_axis(cosines, top, axis=1))
    weights /= weights.sum(axis=1, keepdims=True)
    means: Float64Array = np.einsum("nm,nmk->nk", weights, clusters.means[top])
    return means
