"""The use case behind ``coe evaluate``: find held-out queries, estimate, measure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from experts.errors import ArtifactError, ConfigError
from gateway.evaluation.cascade import CascadeData, evaluate_cascade
from gateway.evaluation.cascade_result import CascadeResult
from gateway.evaluation.intervals import Interval
from gateway.evaluation.measure import measure, router_area
from gateway.evaluation.scored import Known, Scored, routed
from policies.cascade_routing import Search
from policies.frontier import chosen, mix_for_budget, solve_frontier
from routers.artifact import Artifact, check_embedder, load_artifact
from routers.classifier import RouterModel
from routers.embedder import DEFAULT_EMBEDDER, Embedder, load_embedder
from routers.estimate import estimates
from routers.fit import one_thread
from routers.outcome_train import embedded, train_on_outcomes
from routers.outcomes import Outcomes, read_outcomes, text_keys
from routers.quality import QualityModel
from routers.quality_record import Evidence

__all__ = ["EvaluateOptions", "Evaluation", "evaluate", "split_by_prompt"]

Progress = Callable[[str, int, int], None]
IntArray = NDArray[np.int64]

HOLDOUT_DEFAULT: Final = 0.3
_LATENCY_SAMPLES: Final = 200
_WARM_UP: Final = 5


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """Either ``artifact`` or ``train``. ``holdout``: the share of queries that is scored when
    ``train`` is the same folder as ``data``; None means 0.3 then, and must be None otherwise.
    ``train_share``: the part of the training rows that is used, drawn at random, as for a learning
    curve."""

    data: Path
    artifact: Path | None = None
    train: Path | None = None
    budgets: tuple[float, ...] = ()
    holdout: float | None = None
    drop_conflicts: bool = False
    embedder: str = DEFAULT_EMBEDDER
    seed: int = 0
    train_share: float = 1.0
    cascade_search: Search = "greedy"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """``result`` is what ``--json`` writes; ``scored`` what a report draws from."""

    result: dict[str, Any]
    scored: Scored


@dataclass(frozen=True, slots=True)
class _Router:
    """A router to score, however it came about."""

    classifier: RouterModel
    quality: QualityModel
    experts: tuple[str, ...]
    evidence: Evidence
    embedder: Embedder
    admitted: tuple[str, ...]


def evaluate(
    options: EvaluateOptions, progress: Progress, embedder: Embedder | None = None
) -> Evaluation:
    """Score a router on queries it has not seen. Deterministic but for ``latency_ms``.

    With ``artifact``, queries whose prompt is among its training prompts are left out. With
    ``train``, that folder is trained on first, without the prompts that are scored. ``embedder``
    stands in for the one that ``options`` or the artifact names.

    Raises ConfigError for data that cannot be used, ArtifactError for an artifact without
    estimates or with other experts.
    """
    _refuse_idle_flags(options)
    data = read_outcomes(options.data)
    if options.artifact is not None:
        router = _loaded(load_artifact(options.artifact), options.artifact, embedder)
        test = _unseen(data, router, options.artifact)
    else:
        rows, test = _training_rows(options, data)
        router = _trained(options, rows, embedder, progress)
    with one_thread():
        scored = _scored(router, test, progress)
        result = measure(scored, options.budgets, options.seed)
        if (found := _cascade(router, scored, options, progress)) is not None:
            result["cascade"] = found.as_json()
            result["ci95"] |= _cascade_intervals(found, scored)
        result["latency_ms"] = _latency(router, scored)
    return Evaluation({"dataset": data.name, **result, **_origin(options, data, router)}, scored)


def _origin(options: EvaluateOptions, data: Outcomes, router: _Router) -> dict[str, Any]:
    """What was scored with what."""
    return {
        "cost_unit": data.cost_unit,
        "experts": list(router.experts),
        "training_rows": len(router.evidence.score),
        "incomplete_left_out": data.incomplete,
        "seed": options.seed,
        "embedder": router.embedder.id,
        "admitted": list(router.admitted),
    }


# --- which router, which rows ---------------------------------------------------------------------


def _refuse_idle_flags(options: EvaluateOptions) -> None:
    """A flag that would change nothing is a misunderstanding."""
    if options.artifact is None:
        if options.train is None:
            raise ConfigError("coe evaluate", None, "train", "give --artifact or --train")
        return
    idle = {
        "train": options.train is not None,
        "holdout": options.holdout is not None,
        "drop-conflicts": options.drop_conflicts,
        "embedder": options.embedder != DEFAULT_EMBEDDER,
    }
    for flag in (flag for flag, given in idle.items() if given):
        raise ConfigError(
            "coe evaluate", None, flag, "is for training; a saved --artifact is scored as it is"
        )


def _loaded(artifact: Artifact, folder: Path, embedder: Embedder | None) -> _Router:
    quality = artifact.quality
    if quality is None:
        raise ArtifactError(
            str(folder), "was trained on labels alone; train on a folder with outcomes.parquet"
        )
    embedder = embedder or load_embedder(artifact.manifest.embedder.id)
    check_embedder(folder, artifact.manifest, embedder)
    return _Router(
        artifact.model,
        quality.model,
        quality.experts,
        quality.evidence,
        embedder,
        quality.record.admitted,
    )


def _unseen(data: Outcomes, router: _Router, folder: Path) -> Outcomes:
    if set(data.experts) != set(router.experts):
        raise ArtifactError(
            str(folder),
            "estimates other experts than the data has; let one join with: coe train --add-expert",
            {"experts": f"artifact {sorted(router.experts)}, data {sorted(data.experts)}"},
        )
    unseen = np.flatnonzero(~np.isin(text_keys(data.texts), router.evidence.keys))
    if not len(unseen):
        raise ConfigError(
            data.name,
            None,
            "prompt",
            "the artifact was trained on every prompt; hold rows back with --train and --holdout",
        )
    return data.rows(unseen).for_experts(router.experts)


def _training_rows(options: EvaluateOptions, data: Outcomes) -> tuple[Outcomes, Outcomes]:
    assert options.train is not None
    if options.train.resolve() == options.data.resolve():
        holdout = HOLDOUT_DEFAULT if options.holdout is None else options.holdout
        rest, held = split_by_prompt(data, holdout, options.seed)
        return _selected(data.rows(rest), options), data.rows(held)
    if options.holdout is not None:
        raise ConfigError(
            "coe evaluate", None, "holdout", "is for one folder; --train and --data differ"
        )
    rows = read_outcomes(options.train)
    if set(rows.experts) != set(data.experts):
        raise ConfigError(
            str(options.train),
            None,
            "expert",
            f"both folders must record the same experts: here {sorted(rows.experts)}, "
            f"in {options.data} {sorted(data.experts)}",
        )
    kept = np.flatnonzero(~np.isin(text_keys(rows.texts), text_keys(data.texts)))
    return _selected(rows.rows(kept), options), data


def _selected(rows: Outcomes, options: EvaluateOptions) -> Outcomes:
    if options.drop_conflicts:
        rows = rows.without_conflicts()
    if options.train_share == 1.0:
        return rows
    drawn = np.random.default_rng(options.seed).permutation(len(rows))
    return rows.rows(np.sort(drawn[: round(options.train_share * len(rows))]))


def split_by_prompt(data: Outcomes, holdout: float, seed: int) -> tuple[IntArray, IntArray]:
    """Rows to train on and rows to score; equal prompts on one side. Deterministic for a seed.

    Categories keep their shares as far as whole prompts allow: within each, prompts are dealt in
    random order.
    """
    if not 0 < holdout < 1:
        raise ConfigError("coe evaluate", None, "holdout", f"must be between 0 and 1: {holdout:g}")
    _, first, prompt = np.unique(text_keys(data.texts), return_index=True, return_inverse=True)
    labels = np.array(data.categories or ("",) * len(data))[first]
    rng = np.random.default_rng(seed)
    held = np.zeros(len(first), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        held[members[: round(holdout * len(members))]] = True
    return np.flatnonzero(~held[prompt]), np.flatnonzero(held[prompt])


def _trained(
    options: EvaluateOptions, rows: Outcomes, embedder: Embedder | None, progress: Progress
) -> _Router:
    embedder = embedder or load_embedder(options.embedder)
    trained = train_on_outcomes(rows, embedder, seed=options.seed, progress=progress)
    return _Router(
        trained.classifier,
        trained.quality,
        rows.experts,
        trained.evidence,
        embedder,
        trained.admitted,
    )


# --- estimates ------------------------------------------------------------------------------------


def _scored(router: _Router, test: Outcomes, progress: Progress) -> Scored:
    vectors = embedded(test.texts, router.embedder, lambda _, *at: progress("score", *at))
    found = estimates(router.classifier, router.quality, test.texts, vectors)
    evidence = router.evidence
    return Scored(
        outcomes=test,
        known=Known.of(evidence, router.classifier.trained_categories),
        quality=found.quality,
        mapped=found.mapped,
        expected_cost=found.cost,
        category=tuple(decision.category for decision in found.decisions),
        corners=solve_frontier(
            evidence.quality,
            evidence.expected_cost,
            evidence.score,
            evidence.cost,
            evidence.mapped,
        ),
    )


def _cascade(
    router: _Router, scored: Scored, options: EvaluateOptions, progress: Progress
) -> CascadeResult | None:
    """None without confidences on both sides."""
    test, evidence = scored.outcomes, router.evidence
    if test.confidence is None or evidence.confidence is None:
        return None
    data = CascadeData(
        experts=router.experts,
        score_train=evidence.score,
        score_test=test.score,
        cost_train=evidence.cost,
        cost_test=test.cost,
        confidence_train=evidence.confidence,
        confidence_test=test.confidence,
        quality_train=evidence.quality,
        quality_test=scored.quality,
        seed=options.seed,
        search=options.cascade_search,
    )
    names = router.classifier.trained_categories
    if test.categories is not None and not set(names).isdisjoint(test.categories):
        tasks = tuple(names[label] for label in evidence.labels)
        data = replace(data, tasks_train=tasks, tasks_test=test.categories)
    return evaluate_cascade(data, progress)


def _cascade_intervals(found: CascadeResult, scored: Scored) -> dict[str, Interval]:
    """Cascade routing from the best single expert, and its area over the router's."""
    corners = [routed(scored, corner) for corner in scored.corners]
    over = found.area_over(lambda weights: router_area(scored, corners, weights))
    return {**found.from_best_single(), "cascade_auc_minus_router": over}


def _latency(router: _Router, scored: Scored) -> dict[str, float]:
    """One decision at a time: routing text to chosen expert, on one thread."""
    dearest = mix_for_budget(scored.corners, float("inf")).dear
    samples: list[float] = []
    for text in _sampled(scored.outcomes.texts):
        began = time.perf_counter()
        vectors = router.embedder.embed([text])
        found = estimates(router.classifier, router.quality, [text], vectors)
        chosen(found.quality, found.cost, dearest, found.mapped)
        samples.append((time.perf_counter() - began) * 1e3)
    p50, p99 = np.percentile(samples[_WARM_UP:] or samples, [50, 99])
    return {"p50": float(p50), "p99": float(p99)}


def _sampled(texts: Sequence[str]) -> list[str]:
    step = max(1, len(texts) // _LATENCY_SAMPLES)
    return list(texts[::step])[: _LATENCY_SAMPLES + _WARM_UP]
