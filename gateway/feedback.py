"""What callers say of answers: scores, what they teach about experts, and drawing by it. Pure.

A score counts into a Beta distribution per category and expert: a score s adds s to alpha and 1 - s
to beta (for thumbs that is the Bernoulli case). Exploring draws from each expert's distribution and
takes the highest draw: Thompson, "On the likelihood that one unknown probability exceeds another in
view of the evidence of two samples", Biometrika 25, 1933; Agrawal and Goyal, "Analysis of Thompson
sampling for the multi-armed bandit problem", COLT 2012, section 1.1 for scores between 0 and 1.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from experts.errors import InvalidRequest

__all__ = ["Beta", "Feedback", "draw_expert", "outcome_rows", "parse_feedback"]

_ID_CHARS_MAX = 128
_FIELDS = ("decision_id", "score", "thumb")
_THUMBS = {"up": 1.0, "down": 0.0}


@dataclass(frozen=True, slots=True)
class Feedback:
    """``score``: 0 (useless) to 1 (right)."""

    decision_id: str
    score: float


@dataclass(frozen=True, slots=True)
class Beta:
    """What is known of an expert in a category. The prior is uniform."""

    alpha: float = 1.0
    beta: float = 1.0

    @property
    def mean(self) -> float:
        return self.alpha / (self.alpha + self.beta)

    def draw(self, dice: random.Random) -> float:
        return dice.betavariate(self.alpha, self.beta)


def parse_feedback(raw: bytes) -> Feedback:
    """Read the body of ``POST /v1/feedback``. Raises InvalidRequest that names the field."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(None, f"The body is not valid JSON: {error}.") from error
    if not isinstance(body, dict):
        raise InvalidRequest(None, "The body must be a JSON object.")
    if unknown := [name for name in body if name not in _FIELDS]:
        raise InvalidRequest(unknown[0], f"not a field of feedback; known are {', '.join(_FIELDS)}")
    decision = body.get("decision_id")
    if not isinstance(decision, str) or not 0 < len(decision) <= _ID_CHARS_MAX:
        raise InvalidRequest("decision_id", "the x-coe-decision-id of an answer is required")
    return Feedback(decision, _score(body))


def _score(body: Mapping[str, Any]) -> float:
    score, thumb = body.get("score"), body.get("thumb")
    if (score is None) == (thumb is None):
        raise InvalidRequest("score", "either a score or a thumb is required, not both")
    if thumb is not None:
        if not isinstance(thumb, str) or thumb not in _THUMBS:
            raise InvalidRequest("thumb", "expected up or down")
        return _THUMBS[thumb]
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise InvalidRequest("score", "a number from 0 to 1 is expected")
    return float(score)


def draw_expert(
    experts: Iterable[str], known: Mapping[str, Beta], dice: random.Random
) -> str | None:
    """The expert with the highest draw; one without any feedback draws from the prior."""
    draws = {expert: known.get(expert, Beta()).draw(dice) for expert in experts}
    return max(draws, key=lambda expert: draws[expert]) if draws else None


def outcome_rows(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Stored feedback as rows of an outcomes table.

    ``input_sha256`` stands for the query: the gateway keeps no prompt, so rows join a data set
    where somebody does. One row per decision, the last word counts.
    """
    last = {record["decision_id"]: record for record in records}
    return [
        {
            "input_sha256": record["input_sha256"],
            "expert": record["expert"],
            "score": float(record["score"]),
            "cost": record["cost_micro_usd"] / 1e6,
            "category": record["category"],
            "input_tokens": record["input_tokens"],
            "output_tokens": record["output_tokens"],
            "at_ms": record["at_ms"],
        }
        for record in last.values()
    ]
