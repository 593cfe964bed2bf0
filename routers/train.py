"""Train a router on labelled prompts: embed, cross-validate the whole chain, fit, write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from experts.errors import ConfigError
from routers.artifact import TrainingRecord, save_artifact
from routers.dataset import LabelledPrompts, read_prompts
from routers.embedder import (
    DEFAULT_EMBEDDER,
    AblatingEmbedder,
    Embedder,
    Float32Array,
    load_embedder,
)
from routers.fit import FitSettings, Sample, cross_validated, fit
from routers.metrics import Metrics, measured
from routers.text import ROUTING_TEXT_MAX_CHARS

__all__ = ["TrainReport", "train"]

Progress = Callable[[str, int, int], None]

_EMBED_ROWS: Final = 64


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What training found. ``metrics`` are from nested cross-validation, not from fitted rows."""

    categories: tuple[str, ...]
    rows_per_category: dict[str, int]
    duplicates: int
    conflicts: int
    data_digest: str
    embedder_id: str
    artifact_digest: str
    metrics: Metrics


def train(
    data: Path,
    out: Path,
    *,
    seed: int,
    created: str,
    progress: Progress,
    embedder: str = DEFAULT_EMBEDDER,
    drop_conflicts: bool = False,
) -> TrainReport:
    """Train on ``data`` (see ``routers.dataset.read_prompts``) and write an artifact to ``out``.

    ``progress(stage, done, total)`` is called for the stages "embed", "cross-validate", "fit" and
    "write". Two runs with equal data, seed and ``created`` write the same artifact. Raises
    ConfigError for data that cannot be used, ArtifactError for a model that is not installed.
    """
    prompts = read_prompts(data, drop_conflicts=drop_conflicts)
    settings = FitSettings()
    _check_groups(data, prompts, settings.folds)
    loaded = load_embedder(embedder)
    sample = _sample(prompts, loaded, progress)
    decisions = cross_validated(
        sample,
        seed=seed,
        settings=settings,
        progress=lambda done, total: progress("cross-validate", done, total),
    )
    metrics = measured(decisions, prompts.categories)
    progress("fit", 0, 1)
    model = fit(sample, seed=seed, settings=settings)
    progress("fit", 1, 1)
    counts = dict(sorted(Counter(prompts.categories).items()))
    digest = save_artifact(
        out,
        model,
        created=created,
        embedder=loaded,
        text_max_chars=ROUTING_TEXT_MAX_CHARS,
        training=TrainingRecord(prompts.digest, seed, counts, metrics),
    )
    progress("write", 1, 1)
    return TrainReport(
        categories=model.categories,
        rows_per_category=counts,
        duplicates=prompts.duplicates,
        conflicts=prompts.conflicts,
        data_digest=prompts.digest,
        embedder_id=loaded.id,
        artifact_digest=digest,
        metrics=metrics,
    )


def _check_groups(data: Path, prompts: LabelledPrompts, folds: int) -> None:
    """Cross-validation tunes inside each fold, so each category needs twice the folds' groups."""
    pairs = set(zip(prompts.categories, prompts.groups, strict=True))
    groups = Counter(category for category, _ in pairs)
    for name in prompts.names:
        if groups[name] < 2 * folds:
            raise ConfigError(
                str(data),
                None,
                "group",
                f"category {name!r} has {groups[name]} groups, fewer than {2 * folds}; "
                "add prompts of other origin or split its groups",
            )


def _sample(prompts: LabelledPrompts, embedder: Embedder, progress: Progress) -> Sample:
    index = {name: i for i, name in enumerate(prompts.names)}
    group = {name: i for i, name in enumerate(sorted(set(prompts.groups)))}
    vectors, ablated = _embedded(prompts.texts, embedder, progress)
    return Sample(
        vectors=vectors.astype(np.float16),
        labels=np.array([index[c] for c in prompts.categories], dtype=np.int64),
        groups=np.array([group[g] for g in prompts.groups], dtype=np.int64),
        categories=prompts.names,
        ablated=None if ablated is None else ablated.astype(np.float16),
    )


def _embedded(
    texts: Sequence[str], embedder: Embedder, progress: Progress
) -> tuple[Float32Array, Float32Array | None]:
    """[n, d], and [n, 2, d] without head and tail from an embedder that offers it."""
    whole: list[Float32Array] = []
    ablated: list[Float32Array] = []
    for start in range(0, len(texts), _EMBED_ROWS):
        progress("embed", start, len(texts))
        part = texts[start : start + _EMBED_ROWS]
        if isinstance(embedder, AblatingEmbedder):
            vectors, shortened = embedder.embed_ablated(part)
            ablated.append(shortened)
        else:
            vectors = embedder.embed(part)
        whole.append(vectors)
    progress("embed", len(texts), len(texts))
    return np.concatenate(whole), np.concatenate(ablated) if ablated else None
