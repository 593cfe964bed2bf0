"""Feedback folded into recorded outcomes, for training. Pure.

The gateway keeps no prompt, so a row of feedback joins the recorded query whose text has the same
digest. A score is then blended with the recorded one, as one more observation beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from routers.outcomes import Outcomes

__all__ = ["Folded", "fold_feedback"]

_RECORDED_WEIGHT = 1.0  # what was measured counts as one score


@dataclass(frozen=True, slots=True)
class Folded:
    """``cells``: scores of the table that changed. The rest could not be used, and why."""

    outcomes: Outcomes
    rows: int
    cells: int
    unknown_query: int
    unknown_expert: int


def fold_feedback(outcomes: Outcomes, rows: Iterable[Mapping[str, Any]]) -> Folded:
    """``rows`` as ``gateway.feedback.outcome_rows`` makes them: digest, expert, score."""
    by_digest = _by_digest(outcomes)
    column = {expert: number for number, expert in enumerate(outcomes.experts)}
    total = outcomes.score * _RECORDED_WEIGHT
    weight = np.full_like(total, _RECORDED_WEIGHT)
    used = unknown_query = unknown_expert = 0
    for row in rows:
        queries, expert = by_digest.get(row["input_sha256"]), column.get(row["expert"])
        if queries is None:
            unknown_query += 1
        elif expert is None:
            unknown_expert += 1
        else:
            used += 1
            total[queries, expert] += row["score"]
            weight[queries, expert] += 1.0
    changed = int((weight > _RECORDED_WEIGHT).sum())
    return Folded(
        outcomes.with_scores(total / weight), used, changed, unknown_query, unknown_expert
    )


def _by_digest(outcomes: Outcomes) -> dict[str, list[int]]:
    """The gateway digests the text it routes by: of a short single turn, the prompt itself."""
    found: dict[str, list[int]] = {}
    for number, (text, prompt) in enumerate(zip(outcomes.texts, outcomes.prompts, strict=True)):
        for words in {text, prompt}:
            found.setdefault(hashlib.sha256(words.encode()).hexdigest(), []).append(number)
    return found
