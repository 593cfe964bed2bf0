"""A quality model as named arrays and a record, and back. Nothing in it can run code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from routers.features import Vocabulary
from routers.forest import Forest
from routers.quality import (
    COMPONENTS,
    Added,
    Clusters,
    Costs,
    Linear,
    Neighbours,
    Projection,
    QualityModel,
    Recalibration,
    Topics,
)
from routers.ridge import DenseScale
from routers.trees import Trees

__all__ = ["Evidence", "QualityRecord", "quality_arrays", "quality_from_arrays"]

Arrays = Mapping[str, NDArray[Any]]
Float64Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Evidence:
    """The training rows as held-out folds saw them: what prices are solved on.

    ``score`` and ``cost`` [n, k] as recorded, ``quality``, ``mapped`` (by the category map alone)
    and ``expected_cost`` [n, k] estimated without the row, ``labels`` [n] categories, ``keys`` [n]
    digests of the routing texts, so that an evaluation can leave out prompts that training saw.
    ``confidence`` [n, k] of the answers, as recorded: what a cascade learns from. None where the
    data has none, and once an expert has joined that never answered these prompts.
    """

    score: Float64Array
    cost: Float64Array
    quality: Float64Array
    mapped: Float64Array
    expected_cost: Float64Array
    labels: NDArray[np.int64]
    keys: NDArray[np.uint64]
    confidence: Float64Array | None = None


class QualityRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the manifest says of the estimates.

    ``gain``: by how much each opinion lowers the squared error of the differences between experts
    on held-out folds, below the category table's, and its standard error. ``expert_scores``: mean
    recorded score. ``neighbours``: how many vote. ``added``: experts that joined later.
    """

    experts: tuple[str, ...]
    added: tuple[str, ...]
    cost_unit: str
    admitted: tuple[str, ...]
    gain: dict[str, tuple[float, float]]
    expert_scores: dict[str, float]
    expert_costs: dict[str, float]
    neighbours: int
    arrays_file: str
    arrays_digest: str


def quality_arrays(model: QualityModel, evidence: Evidence) -> dict[str, NDArray[Any]]:
    """Every array of a model and its evidence, by name."""
    arrays: dict[str, NDArray[Any]] = {
        "vocabulary.ids": model.vocabulary.ids,
        "vocabulary.idf": model.vocabulary.idf,
        "scale.mean": model.scale.mean,
        "scale.spread": model.scale.spread,
        "mean": model.mean,
        "table": model.table,
        "mixing": model.mixing,
        "evidence.score": evidence.score.astype(np.float32),
        "evidence.cost": evidence.cost,
        "evidence.quality": evidence.quality.astype(np.float32),
        "evidence.mapped": evidence.mapped.astype(np.float32),
        "evidence.expected_cost": evidence.expected_cost,
        "evidence.labels": evidence.labels,
        "evidence.keys": evidence.keys,
    }
    parts: dict[str, Any] = {
        "recalibration": model.recalibration,
        "costs": model.costs,
        "topics": model.topics,
        "linear": model.linear,
        "denoised": model.denoised,
        "clusters": model.clusters,
        "projection": model.projection,
        "trees": model.trees,
        "forest": model.forest,
        "added": model.added,
    }
    for name, part in parts.items():
        if part is not None:
            fields = type(part).__slots__
            arrays |= {f"{name}.{field}": np.asarray(getattr(part, field)) for field in fields}
    if model.neighbours is not None:
        arrays["neighbours.score"] = model.neighbours.score
    if evidence.confidence is not None:
        arrays["evidence.confidence"] = evidence.confidence.astype(np.float32)
    return arrays


def quality_from_arrays(record: QualityRecord, arrays: Arrays) -> tuple[QualityModel, Evidence]:
    """Undo ``quality_arrays``. Raises KeyError for a missing array, ValueError for a shape."""

    def plain(array: NDArray[Any]) -> Any:
        return array if array.ndim else array.item()

    def part(kind: type[Any], name: str) -> Any:
        fields = kind.__slots__
        present = [f"{name}.{field}" in arrays for field in fields]
        if not any(present):
            return None
        return kind(**{field: plain(arrays[f"{name}.{field}"]) for field in fields})

    score, confidence = arrays.get("neighbours.score"), arrays.get("evidence.confidence")
    model = QualityModel(
        experts=record.experts,
        vocabulary=part(Vocabulary, "vocabulary"),
        scale=part(DenseScale, "scale"),
        mean=arrays["mean"],
        table=arrays["table"],
        topics=part(Topics, "topics"),
        linear=part(Linear, "linear"),
        denoised=part(Linear, "denoised"),
        neighbours=None if score is None else Neighbours(score, record.neighbours),
        clusters=part(Clusters, "clusters"),
        projection=part(Projection, "projection"),
        trees=part(Trees, "trees"),
        forest=part(Forest, "forest"),
        mixing=arrays["mixing"],
        recalibration=part(Recalibration, "recalibration"),
        costs=part(Costs, "costs"),
        added=part(Added, "added"),
    )
    evidence = Evidence(
        score=arrays["evidence.score"].astype(np.float64),
        cost=arrays["evidence.cost"],
        quality=arrays["evidence.quality"].astype(np.float64),
        mapped=arrays["evidence.mapped"].astype(np.float64),
        expected_cost=arrays["evidence.expected_cost"],
        labels=arrays["evidence.labels"],
        keys=arrays["evidence.keys"],
        confidence=None if confidence is None else confidence.astype(np.float64),
    )
    _check(record, model, evidence)
    return model, evidence


def _check(record: QualityRecord, model: QualityModel, evidence: Evidence) -> None:
    k = len(record.experts)
    shapes = {
        "mean": (model.mean.shape, (k,)),
        "table": (model.table.shape[1:], (k,)),
        "mixing": (model.mixing.shape, (2, len(COMPONENTS))),
        "evidence": (evidence.score.shape, evidence.quality.shape),
        "evidence.mapped": (evidence.score.shape, evidence.mapped.shape),
        "costs": (model.costs.bias.shape, (k,)),
        "recalibration": (model.recalibration.slope.shape, (k,)),
    }
    if evidence.confidence is not None:
        shapes["evidence.confidence"] = (evidence.score.shape, evidence.confidence.shape)
    if model.added is not None:
        shapes["added"] = (model.added.loadings.shape, (k, len(record.added)))
    for name, (found, wanted) in shapes.items():
        if found != wanted:
            raise ValueError(f"{name} has shape {found}, not {wanted}")
    for name, weights in zip(COMPONENTS[1:], model.mixing.T[1:], strict=True):
        if weights.any() and getattr(model, name) is None:
            raise ValueError(f"{name} has a weight and no arrays")
