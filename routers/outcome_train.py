"""Train the whole two-step router on recorded outcomes: categories, then estimates per expert."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from experts.errors import ConfigError
from routers.classifier import RouterModel
from routers.embedder import Embedder, Float32Array
from routers.features import hashed, signs
from routers.fit import FitSettings, Sample, fit_with_decisions, one_thread, thinned_rows
from routers.metrics import Metrics, measured
from routers.outcomes import Outcomes, text_keys
from routers.quality import QualityModel
from routers.quality_fit import OutcomeSample, QualitySettings, fit_quality
from routers.quality_record import Evidence
from routers.types import GENERAL

__all__ = [
    "ROWS_MIN",
    "TrainedRouter",
    "categories_of",
    "embedded",
    "topics_of",
    "train_on_outcomes",
]

IntArray = NDArray[np.int64]
Progress = Callable[[str, int, int], None]

ROWS_MIN: Final = 100
_EMBED_ROWS: Final = 64
_CATEGORY_ROWS_MIN: Final = 20
_DISCOVERED_MAX: Final = 16
_TOPIC_ROWS_MIN: Final = 30
_TOPICS_MAX: Final = 128
_ROWS_PER_DISCOVERED: Final = 60
_CLASSIFIER: Final = FitSettings(
    neighbours=(10, 40), knn_shares=(0.0, 0.25, 0.5), inverse_penalties=(10.0,), iterations_max=300
)


@dataclass(frozen=True, slots=True)
class TrainedRouter:
    """Both steps, and what held-out folds say of them.

    ``gain`` and ``admitted`` are explained at ``routers.quality_fit.OutOfFold``. ``discovered``:
    the data named no categories, so clusters of prompts stand for them.
    """

    outcomes: Outcomes
    classifier: RouterModel
    quality: QualityModel
    evidence: Evidence
    metrics: Metrics
    admitted: tuple[str, ...]
    gain: dict[str, tuple[float, float]]
    rows_per_category: dict[str, int]
    discovered: bool


def train_on_outcomes(
    outcomes: Outcomes,
    embedder: Embedder,
    *,
    seed: int,
    progress: Progress,
    settings: QualitySettings | None = None,
    vectors: Float32Array | None = None,
) -> TrainedRouter:
    """Fit both steps on the rows of ``outcomes``. Deterministic for data and seed.

    ``vectors`` [n, d], if given, are the embeddings of ``outcomes.texts``. Raises ConfigError for
    fewer than 100 rows.
    """
    if len(outcomes) < ROWS_MIN:
        raise ConfigError(
            outcomes.name, None, "", f"{len(outcomes)} queries; estimates need {ROWS_MIN} or more"
        )
    if vectors is None:
        vectors = embedded(outcomes.texts, embedder, progress)
    with one_thread():
        return _trained(outcomes, vectors, seed, progress, settings)


def _trained(
    outcomes: Outcomes,
    vectors: Float32Array,
    seed: int,
    progress: Progress,
    settings: QualitySettings | None,
) -> TrainedRouter:
    labels, discovered = categories_of(outcomes, vectors, seed)
    sample = _labelled(outcomes, vectors, labels)
    progress("categories", 0, 1)
    classifier, posterior, decisions = fit_with_decisions(sample, seed=seed, settings=_CLASSIFIER)
    progress("categories", 1, 1)
    topics, parent = topics_of(sample.labels, outcomes.sources)
    rows = OutcomeSample(
        vectors=sample.vectors,
        texts=tuple(hashed(text) for text in outcomes.texts),
        signs=np.array([signs(text) for text in outcomes.texts]),
        labels=topics,
        groups=sample.groups,
        parent=parent,
        experts=outcomes.experts,
        score=outcomes.score,
        cost=outcomes.cost,
        references=thinned_rows(len(outcomes), _CLASSIFIER.references_max, seed),
    )
    quality, held = fit_quality(
        rows,
        posterior,
        seed=seed,
        settings=settings,
        progress=lambda done, total: progress("estimates", done, total),
    )
    evidence = Evidence(
        outcomes.score,
        outcomes.cost,
        held.quality,
        held.table,
        held.cost,
        sample.labels,
        text_keys(outcomes.texts),
        outcomes.confidence,
    )
    return TrainedRouter(
        outcomes=outcomes,
        classifier=classifier,
        quality=quality,
        evidence=evidence,
        metrics=measured(decisions, labels),
        admitted=held.admitted,
        gain=held.gain,
        rows_per_category=dict(sorted(Counter(labels).items())),
        discovered=discovered,
    )


def embedded(texts: Sequence[str], embedder: Embedder, progress: Progress) -> Float32Array:
    """[n, d] unit rows, in steps that ``progress("embed", ...)`` sees."""
    parts = []
    for start in range(0, len(texts), _EMBED_ROWS):
        progress("embed", start, len(texts))
        parts.append(embedder.embed(texts[start : start + _EMBED_ROWS]))
    progress("embed", len(texts), len(texts))
    return np.concatenate(parts)


def categories_of(
    outcomes: Outcomes, vectors: Float32Array, seed: int
) -> tuple[tuple[str, ...], bool]:
    """A category per row, and whether they had to be discovered.

    A category of fewer than 20 rows cannot be learned and counts as ``general``. Where fewer than
    two are left, clusters of the embeddings stand for categories.
    """
    if outcomes.categories is not None:
        counts = Counter(outcomes.categories)
        small = {name for name, rows in counts.items() if rows < _CATEGORY_ROWS_MIN}
        kept = tuple(GENERAL if name in small else name for name in outcomes.categories)
        if len(counts) - len(small) >= 2 and not 0 < kept.count(GENERAL) < _CATEGORY_ROWS_MIN:
            return kept, False
        if len(counts) - len(small) >= 2:
            largest = counts.most_common(1)[0][0]
            return tuple(largest if name == GENERAL else name for name in kept), False
    return _discovered(vectors, seed), True


def topics_of(categories: IntArray, sources: tuple[str, ...] | None) -> tuple[IntArray, IntArray]:
    """[n] topic per row and [t] each topic's category.

    A source with 30 or more rows within a category is a topic of its own, the 128 largest in all;
    what is left of a category is one topic, and always there.
    """
    count = int(categories.max()) + 1
    topics, parent = categories.copy(), list(range(count))
    if sources is None:
        return topics, np.array(parent)
    cells = Counter(zip(map(int, categories), sources, strict=True))
    whole = Counter(map(int, categories))
    finer = [
        (category, source)
        for (category, source), rows in sorted(cells.items(), key=lambda cell: (-cell[1], cell[0]))
        if _TOPIC_ROWS_MIN <= rows < whole[category]
    ][:_TOPICS_MAX]
    index = {cell: count + i for i, cell in enumerate(finer)}
    rows = enumerate(zip(map(int, categories), sources, strict=True))
    for i, cell in rows:
        topics[i] = index.get(cell, topics[i])
    return topics, np.array([*parent, *(category for category, _ in finer)])


def _discovered(vectors: Float32Array, seed: int) -> tuple[str, ...]:
    from sklearn.cluster import KMeans

    count = int(np.clip(len(vectors) // _ROWS_PER_DISCOVERED, 2, _DISCOVERED_MAX))
    found = KMeans(count, n_init=4, random_state=seed).fit(vectors).labels_
    return tuple(f"cluster-{label:02d}" for label in found)


def _labelled(outcomes: Outcomes, vectors: Float32Array, labels: Sequence[str]) -> Sample:
    names = tuple(sorted(set(labels)))
    index = {name: i for i, name in enumerate(names)}
    _, groups = np.unique(text_keys(outcomes.texts), return_inverse=True)
    return Sample(
        vectors=vectors.astype(np.float16),
        labels=np.array([index[label] for label in labels], dtype=np.int64),
        groups=groups.astype(np.int64),
        categories=names,
    )
