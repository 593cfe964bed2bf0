"""From recorded outcomes with confidences to a per-query policy with drafts. Pure.

What a gateway needs to run a cascade is fitted here by the code that evaluation uses, and written
into the policy file: the table of quality by category and expert, each expert's calibration with an
offset per category, and the first row of the joint covariance of errors: how far one answer's
confidence moves the estimate of its own quality (``confidence_sd``) and of every other expert's
(``confidence_moves``), believed at half its size as in ``policies.joint_estimates``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import yaml
from numpy.typing import NDArray

from experts.errors import ConfigError
from policies.answer_features import LOGPROB_FLOOR
from policies.calibration import Calibration, Evidence
from policies.calibration_fit import Group, fit_calibration
from policies.joint_estimates import fit_joint_estimates
from policies.mapping import category_table
from routers.outcomes import Outcomes
from routers.types import GENERAL

__all__ = ["CascadeFit", "cascade_policy_text", "fit_cascade", "recorded_evidence"]

FloatArray = NDArray[np.float64]
Tick = Callable[[str, int, int], None]

_FOLDS: Final = 5
_GROUPS: Final[tuple[Group, ...]] = ("doubt",)
_SD_MIN: Final = 0.01  # less news than this is worth no stage
_DIGITS: Final = 4


@dataclass(frozen=True, slots=True)
class CascadeFit:
    """``quality``: category -> expert -> mean score, shrunk by its count. ``calibrations``,
    ``confidence_sd`` and ``confidence_moves`` of the experts whose answers tell something;
    ``confidence`` (n, k) is what each answer's own calibration says, out of fold.
    """

    experts: tuple[str, ...]
    default: str
    quality: Mapping[str, Mapping[str, float]]
    calibrations: Mapping[str, Calibration]
    confidence_sd: Mapping[str, float]
    confidence_moves: Mapping[str, Mapping[str, float]]
    confidence: FloatArray


def fit_cascade(
    outcomes: Outcomes,
    *,
    groups: Collection[Group] = _GROUPS,
    seed: int = 0,
    tick: Tick = lambda *_: None,
) -> CascadeFit:
    """``groups`` of features beside the mean; deterministic for ``seed``.

    The data's confidences have to be what a gateway sees: the mean log-probability of an answer's
    tokens. Raises ConfigError where it has none.
    """
    if outcomes.confidence is None:
        reason = "the data has no confidences; a cascade needs the mean token log-probabilities"
        raise ConfigError(outcomes.name, None, "confidence", reason)
    names = tuple(outcomes.categories or [GENERAL] * len(outcomes))
    categories = tuple(sorted(set(names)))
    labels = np.searchsorted(np.array(categories), np.array(names)).astype(np.int64)
    table, _ = category_table(labels, outcomes.score, len(categories))
    prior = table[labels]
    confidence, calibrations = prior.copy(), {}
    for column, expert in enumerate(outcomes.experts):
        fit = _calibrated(outcomes, column, names, groups, seed)
        if fit is not None:
            calibrations[expert], confidence[:, column] = fit
        tick("experts", column + 1, len(outcomes.experts))
    joint, _ = fit_joint_estimates(prior, confidence, outcomes.score)
    spread, moves = _news(outcomes.experts, calibrations, joint.first_moves())
    overall = outcomes.score.mean(axis=0)
    return CascadeFit(
        experts=outcomes.experts,
        default=outcomes.experts[int(overall.argmax())],
        quality=_rows(categories, outcomes.experts, table, overall),
        calibrations={name: calibrations[name] for name in spread},
        confidence_sd=spread,
        confidence_moves=moves,
        confidence=confidence,
    )


def recorded_evidence(logprob: float) -> Evidence:
    """A whole answer of which only the mean token log-probability is known, -inf among them."""
    value = max(LOGPROB_FLOOR, min(0.0, logprob))
    return Evidence(value, 1, True, 0.0, (value,))


def _calibrated(
    outcomes: Outcomes,
    column: int,
    categories: tuple[str, ...],
    groups: Collection[Group],
    seed: int,
) -> tuple[Calibration, FloatArray] | None:
    """On all rows, and each row's confidence out of fold; None where nothing can be told."""
    assert outcomes.confidence is not None
    raw, right = outcomes.confidence[:, column], outcomes.score[:, column] >= 0.5
    if np.isnan(raw).any() or min(right.sum(), (~right).sum()) < _FOLDS:
        return None
    answers = [recorded_evidence(float(value)) for value in raw]
    fold = np.random.default_rng(seed).permutation(len(right)) % _FOLDS
    confidence = np.empty(len(right))
    for held in range(_FOLDS):
        seen = np.flatnonzero(fold != held)
        if len(set(right[seen].tolist())) < 2:
            return None
        some = [categories[i] for i in seen]
        fit = _fit([answers[i] for i in seen], right[seen], some, groups)
        for row in np.flatnonzero(fold == held):
            confidence[row] = fit.for_category(categories[row]).confidence(answers[row])
    return _fit(answers, right, categories, groups), confidence


def _fit(
    answers: list[Evidence],
    right: NDArray[np.bool_],
    categories: Sequence[str],
    groups: Collection[Group],
) -> Calibration:
    several = categories if len(set(categories)) > 1 else None
    return fit_calibration(answers, right.tolist(), groups=groups, categories=several)


def _news(
    experts: tuple[str, ...], calibrations: Mapping[str, Calibration], moves: FloatArray
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Own and other moves [draft, expert] of those whose answers tell enough of themselves."""
    spread: dict[str, float] = {}
    others: dict[str, dict[str, float]] = {}
    for row, draft in enumerate(experts):
        own = float(moves[row, row])
        if draft not in calibrations or own < _SD_MIN:
            continue
        spread[draft] = round(own, _DIGITS)
        others[draft] = {
            expert: round(float(np.clip(moves[row, column], -1.0, 1.0)), _DIGITS)
            for column, expert in enumerate(experts)
            if column != row
        }
    return spread, others


def _rows(
    categories: tuple[str, ...], experts: tuple[str, ...], table: FloatArray, overall: FloatArray
) -> dict[str, dict[str, float]]:
    rows = dict(zip(categories, table, strict=True))
    rows.setdefault(GENERAL, overall)
    return {
        name: {e: round(float(v), _DIGITS) for e, v in zip(experts, row, strict=True)}
        for name, row in rows.items()
    }


def cascade_policy_text(
    fit: CascadeFit,
    *,
    quality_per_usd: float,
    cap_usd: float,
    stages: int,
    output_tokens: int,
    description: str,
) -> str:
    """The policy as YAML, ready for ``coe policy check``."""
    policy = {
        "version": 1,
        "description": description,
        "default": fit.default,
        "fallbacks": [fit.default],
        "per_query": {
            "quality_per_usd": quality_per_usd,
            "output_tokens_expected": output_tokens,
            "quality": {name: dict(row) for name, row in fit.quality.items()},
            "confidence_sd": dict(fit.confidence_sd),
            "confidence_moves": {name: dict(row) for name, row in fit.confidence_moves.items()},
        },
        "cascade": {"calibration": {name: _section(one) for name, one in fit.calibrations.items()}},
        "caps": {"stages": stages, "cost_usd": cap_usd},
    }
    return yaml.safe_dump(policy, sort_keys=False, allow_unicode=True, width=100)


def _section(fit: Calibration) -> dict[str, Any]:
    offsets = {name: round(value, _DIGITS) for name, value in fit.by_category.items()}
    weights = {"slope": fit.slope, "intercept": fit.intercept, "doubt": fit.doubt}
    numbers = {name: round(value, _DIGITS) for name, value in weights.items()}
    return {**numbers, **({"by_category": offsets} if offsets else {})}
