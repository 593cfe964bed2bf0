"""What ``coe train`` does: labels alone, or outcomes; the result as plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experts.errors import ConfigError
from gateway.feedback_fold import Folded, fold_feedback
from routers.add_expert import add_expert
from routers.artifact import check_embedder, load_artifact
from routers.embedder import load_embedder
from routers.outcome_save import save_joined, save_trained
from routers.outcome_train import train_on_outcomes
from routers.outcomes import holds_outcomes, read_outcomes
from routers.train import train as train_on_labels

__all__ = ["TrainOptions", "add_to", "train"]

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """``created`` is written into the artifact; equal options give an equal artifact."""

    data: Path
    out: Path
    seed: int
    created: str
    embedder: str
    drop_conflicts: bool = False
    feedback: tuple[Mapping[str, Any], ...] | None = None


def train(options: TrainOptions, progress: Progress) -> dict[str, Any]:
    """Train and write. Raises ConfigError for data that cannot be used, ArtifactError."""
    if not holds_outcomes(options.data):
        if options.feedback is not None:
            reason = "feedback changes scores, and there is no outcomes.parquet to change"
            raise ConfigError(str(options.data), None, "", reason)
        report = train_on_labels(
            options.data,
            options.out,
            seed=options.seed,
            created=options.created,
            progress=progress,
            embedder=options.embedder,
            drop_conflicts=options.drop_conflicts,
        )
        return {**asdict(report), "artifact": str(options.out)}
    outcomes = read_outcomes(options.data)
    if options.drop_conflicts:
        outcomes = outcomes.without_conflicts()
    folded = None
    if options.feedback is not None:
        folded = fold_feedback(outcomes, options.feedback)
        outcomes = folded.outcomes
    embedder = load_embedder(options.embedder)
    trained = train_on_outcomes(outcomes, embedder, seed=options.seed, progress=progress)
    digest = save_trained(
        options.out, trained, embedder=embedder, seed=options.seed, created=options.created
    )
    progress("write", 1, 1)
    return {
        "artifact": str(options.out),
        "artifact_digest": digest,
        "data_digest": outcomes.digest,
        "embedder_id": embedder.id,
        "experts": list(outcomes.experts),
        "categories_discovered": trained.discovered,
        "rows_per_category": trained.rows_per_category,
        "metrics": asdict(trained.metrics),
        "estimates_admitted": list(trained.admitted),
        "estimates_gain": trained.gain,
        "incomplete_left_out": outcomes.incomplete,
        "feedback": None if folded is None else _folding(folded),
    }


def _folding(folded: Folded) -> dict[str, int]:
    return {
        "rows_used": folded.rows,
        "scores_changed": folded.cells,
        "rows_of_unknown_queries": folded.unknown_query,
        "rows_of_unknown_experts": folded.unknown_expert,
    }


def add_to(artifact: Path, options: TrainOptions) -> dict[str, Any]:
    """Let the experts of a profile folder join ``artifact``; the result goes to ``options.out``.

    Raises ConfigError for a profile that cannot be used, ArtifactError.
    """
    profile = read_outcomes(options.data, experts_min=1)
    loaded = load_artifact(artifact)
    embedder = load_embedder(loaded.manifest.embedder.id)
    check_embedder(artifact, loaded.manifest, embedder)
    quality, reports = add_expert(loaded, profile, embedder, seed=options.seed)
    digest = save_joined(options.out, loaded, quality, embedder=embedder, created=options.created)
    return {
        "artifact": str(options.out),
        "artifact_digest": digest,
        "experts": list(quality.experts),
        "joined": [asdict(report) for report in reports],
    }
