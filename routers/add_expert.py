"""A new expert joins a trained router from a small profile set; nothing else is fitted again.

The trained experts' estimates span what the router can tell about a query. The newcomer is placed
in that span by a ridge regression of its profile outcomes on them, and corrected per category.
UniRoute (arXiv 2502.08773) places a newcomer by its errors per cluster; the estimates are a finer
basis for the same idea.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from experts.errors import ConfigError
from routers.artifact import Artifact, Quality
from routers.embedder import Embedder
from routers.estimate import Estimates, estimates
from routers.outcomes import Outcomes
from routers.quality import Added
from routers.quality_record import Evidence

__all__ = ["JoinReport", "add_expert"]

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

PROFILE_ROWS_MIN: Final = 20
_PENALTY: Final = 5.0
_PSEUDO_COUNTS: Final = 20.0
_FOLDS: Final = 5


@dataclass(frozen=True, slots=True)
class JoinReport:
    """``gain``: by how much the estimates' squared error on held-out profile rows is below that of
    the expert's mean score; zero or less, and the mean is all that was kept (``admitted``)."""

    expert: str
    rows: int
    score: float
    gain: float
    admitted: bool


def add_expert(
    artifact: Artifact, profile: Outcomes, embedder: Embedder, *, seed: int
) -> tuple[Quality, list[JoinReport]]:
    """The artifact's estimates with the experts of ``profile`` that they lack.

    ``profile`` may be small and of any prompts; outcomes of known experts in it are not used.
    Raises ConfigError when it is too small or holds nobody new, or the artifact has no estimates.
    """
    quality = artifact.quality
    if quality is None:
        raise ConfigError("coe train", None, "add-expert", "the artifact holds no estimates")
    new = [name for name in profile.experts if name not in quality.experts]
    if not new:
        raise ConfigError(profile.name, None, "expert", "every expert is in the artifact already")
    if len(profile) < PROFILE_ROWS_MIN:
        raise ConfigError(
            profile.name, None, "", f"{len(profile)} queries; a profile needs {PROFILE_ROWS_MIN}"
        )
    found = estimates(artifact.model, quality.model, profile.texts, embedder.embed(profile.texts))
    reports = []
    for name in new:
        column = profile.experts.index(name)
        quality, report = _joined(
            quality, found, name, profile.score[:, column], profile.cost[:, column], seed
        )
        reports.append(report)
    return quality, reports


def _joined(
    quality: Quality,
    found: Estimates,
    name: str,
    score: Float64Array,
    cost: Float64Array,
    seed: int,
) -> tuple[Quality, JoinReport]:
    trained = len(quality.record.experts)
    basis, posterior = found.quality[:, :trained], found.posterior
    error = np.zeros(len(score))
    for rest, out in _folds(len(score), seed):
        loadings, intercept, table = _fit(basis[rest], posterior[rest], score[rest])
        guess = np.clip(intercept + basis[out] @ loadings + posterior[out] @ table, 0.0, 1.0)
        error[out] = (score[rest].mean() - score[out]) ** 2 - (guess - score[out]) ** 2
    gain = float(error.mean())
    loadings, intercept, table = _fit(basis, posterior, score)
    if gain <= 0:
        loadings, intercept, table = 0 * loadings, float(score.mean()), 0 * table
    paid = float(cost.mean() / max(float(found.cost[:, :trained].mean()), 1e-300))
    part = Added(
        loadings[:, None],
        np.array([intercept]),
        table[:, None],
        np.full((trained, 1), paid / trained),
    )
    model = msgspec.structs.replace(
        quality,
        model=quality.model.with_added(part),
        evidence=_extended(quality.evidence, part, trained),
        record=msgspec.structs.replace(
            quality.record,
            added=(*quality.record.added, name),
            expert_scores=quality.record.expert_scores | {name: float(score.mean())},
            expert_costs=quality.record.expert_costs | {name: float(cost.mean())},
        ),
    )
    return model, JoinReport(name, len(score), float(score.mean()), gain, gain > 0)


def _folds(rows: int, seed: int) -> Iterator[tuple[IntArray, IntArray]]:
    fold = np.random.default_rng(seed).permutation(rows) % _FOLDS
    for f in range(_FOLDS):
        yield np.flatnonzero(fold != f), np.flatnonzero(fold == f)


def _fit(
    basis: Float64Array, posterior: Float64Array, score: Float64Array
) -> tuple[Float64Array, float, Float64Array]:
    """Loadings pulled to an even share of each trained expert, intercept, and table [c]."""
    k = basis.shape[1]
    even = np.full(k, 1.0 / k)
    centre, mean = basis.mean(axis=0), float(score.mean())
    inside = basis - centre
    rest = (score - mean) - inside @ even
    loadings = even + np.linalg.solve(inside.T @ inside + _PENALTY * np.eye(k), inside.T @ rest)
    intercept = mean - float(centre @ loadings)
    left = score - intercept - basis @ loadings
    table = posterior.T @ left / (posterior.sum(axis=0) + _PSEUDO_COUNTS)
    return loadings, intercept, table


def _extended(evidence: Evidence, part: Added, trained: int) -> Evidence:
    """Evidence rows of the newcomer are estimates: it never answered the training prompts."""
    category = part.intercept + part.table[evidence.labels]
    quality, mapped = (
        np.clip(known[:, :trained] @ part.loadings + category, 0.0, 1.0)
        for known in (evidence.quality, evidence.mapped)
    )
    cost = evidence.expected_cost[:, :trained] @ part.cost_loadings
    return Evidence(
        np.hstack([evidence.score, quality]),
        np.hstack([evidence.cost, cost]),
        np.hstack([evidence.quality, quality]),
        np.hstack([evidence.mapped, mapped]),
        np.hstack([evidence.expected_cost, cost]),
        evidence.labels,
        evidence.keys,
    )
