"""A router trained on outcomes, as an artifact; and one more expert for an artifact that exists."""

from __future__ import annotations

from pathlib import Path

from routers.artifact import Artifact, Quality, TrainingRecord, save_artifact
from routers.embedder import Embedder
from routers.outcome_train import TrainedRouter
from routers.quality_record import QualityRecord
from routers.text import ROUTING_TEXT_MAX_CHARS

__all__ = ["save_joined", "save_trained"]


def save_trained(
    folder: Path, trained: TrainedRouter, *, embedder: Embedder, seed: int, created: str
) -> str:
    """Write the artifact folder; returns the artifact's digest."""
    outcomes, neighbours = trained.outcomes, trained.quality.neighbours
    scores, costs = outcomes.score.mean(axis=0), outcomes.cost.mean(axis=0)
    record = QualityRecord(
        experts=outcomes.experts,
        added=(),
        cost_unit=outcomes.cost_unit,
        admitted=trained.admitted,
        gain=trained.gain,
        expert_scores=dict(zip(outcomes.experts, map(float, scores), strict=True)),
        expert_costs=dict(zip(outcomes.experts, map(float, costs), strict=True)),
        neighbours=0 if neighbours is None else neighbours.count,
        arrays_file="",
        arrays_digest="",
    )
    return save_artifact(
        folder,
        trained.classifier,
        created=created,
        embedder=embedder,
        text_max_chars=ROUTING_TEXT_MAX_CHARS,
        training=TrainingRecord(outcomes.digest, seed, trained.rows_per_category, trained.metrics),
        quality=Quality(trained.quality, trained.evidence, record),
    )


def save_joined(
    folder: Path, artifact: Artifact, quality: Quality, *, embedder: Embedder, created: str
) -> str:
    """Write ``artifact`` with other estimates; returns the new digest."""
    return save_artifact(
        folder,
        artifact.model,
        created=created,
        embedder=embedder,
        text_max_chars=artifact.manifest.text_max_chars,
        training=artifact.manifest.training,
        quality=quality,
    )
