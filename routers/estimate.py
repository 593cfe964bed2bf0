"""Texts in; categories, quality and cost per expert out: both steps of the router, in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from routers.classifier import RouterModel
from routers.embedder import Float32Array
from routers.quality import QualityModel, text_features
from routers.types import Classification

__all__ = ["Estimates", "classify_with_quality", "estimates"]

Float64Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimates:
    """For n texts and k experts: ``quality`` in 0..1, the same by the category map alone
    (``mapped``) and ``cost``, all [n, k]; posterior [n, c], and the decisions of step one."""

    quality: Float64Array
    mapped: Float64Array
    cost: Float64Array
    posterior: Float64Array
    decisions: tuple[Classification, ...]


def estimates(
    classifier: RouterModel,
    quality: QualityModel,
    texts: Sequence[str],
    vectors: Float32Array,
    ablated: Float32Array | None = None,
) -> Estimates:
    """Estimate for routing texts and their embeddings [n, d]; ``ablated`` [n, 2, d] for gates."""
    cosines = classifier.cosines(vectors)
    posterior, nearest = classifier.posterior_given(vectors, cosines)
    features = text_features(texts, quality.vocabulary)
    opinions = quality.opinions(vectors, features, posterior, cosines)
    return Estimates(
        quality.estimate(opinions, posterior),
        quality.mapped(opinions, posterior),
        quality.cost(vectors, features),
        posterior,
        tuple(classifier.decide(posterior, nearest, ablated)),
    )


def classify_with_quality(
    classifier: RouterModel,
    quality: QualityModel,
    experts: Sequence[str],
    texts: Sequence[str],
    vectors: Float32Array,
    ablated: Float32Array | None = None,
) -> list[Classification]:
    """Decisions that carry an estimate for each of ``experts`` (trained, then added)."""
    found = estimates(classifier, quality, texts, vectors, ablated)
    return [
        replace(decision, quality=dict(zip(experts, map(float, row), strict=True)))
        for decision, row in zip(found.decisions, found.quality, strict=True)
    ]
