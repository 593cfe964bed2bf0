"""What an answer, or its beginning, says of itself by its tokens' probabilities. Pure.

A mean hides one doubtful token in a sure answer, which a minimum or a low quantile shows ("Language
Model Cascades: Token-level uncertainty and beyond", 2404.10136, section 4). The log-probability of
the token that was drawn says nothing of what else was likely; the entropy of the alternatives does.
Gateways read these features at every judgement, so they are plain arithmetic; what fits their
weights (``policies.calibration_fit``) reads the same functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Final

__all__ = [
    "ENTROPY_TOP",
    "LOGPROB_FLOOR",
    "AnswerFeatures",
    "EntropyFeatures",
    "answer_features",
    "entropy_features",
    "log_doubt",
    "truncated_entropy",
]

LOGPROB_FLOOR: Final = -20.0
"""APIs report -inf for a token outside their table."""

ENTROPY_TOP: Final = 5
"""Alternatives an entropy is made of. More are not granted everywhere, and an entropy over more of
them is another number: fitting and serving read the same count."""

_DOUBT_MIN: Final = 1e-6  # less is reported as certainty


@dataclass(frozen=True, slots=True)
class AnswerFeatures:
    """Natural logarithms, each within [``LOGPROB_FLOOR``, 0]. ``quantile_*`` as numpy's linear."""

    mean: float
    minimum: float
    first: float
    quantile_10: float
    quantile_25: float
    quantile_50: float

    def values(self) -> tuple[float, ...]:
        """In the order of the fields."""
        return astuple(self)


@dataclass(frozen=True, slots=True)
class EntropyFeatures:
    """Over an answer's tokens, of ``truncated_entropy``: nats within [0, ln(ENTROPY_TOP + 1)]."""

    mean: float
    maximum: float
    quantile_90: float

    def values(self) -> tuple[float, ...]:
        """In the order of the fields."""
        return astuple(self)


def answer_features(logprobs: Sequence[float]) -> AnswerFeatures:
    """Raises ValueError without tokens: silence is not confidence."""
    if not logprobs:
        raise ValueError("an answer without log-probabilities has no features")
    values = [min(0.0, max(LOGPROB_FLOOR, value)) for value in logprobs]
    ranked = sorted(values)
    return AnswerFeatures(
        mean=sum(values) / len(values),
        minimum=ranked[0],
        first=values[0],
        quantile_10=_quantile(ranked, 0.1),
        quantile_25=_quantile(ranked, 0.25),
        quantile_50=_quantile(ranked, 0.5),
    )


def entropy_features(entropies: Sequence[float]) -> EntropyFeatures:
    """Raises ValueError without tokens."""
    if not entropies:
        raise ValueError("an answer without alternatives has no entropy")
    ranked = sorted(entropies)
    return EntropyFeatures(sum(ranked) / len(ranked), ranked[-1], _quantile(ranked, 0.9))


def log_doubt(mean_logprob: float) -> float:
    """Logarithm of 1 - e^mean, the probability that a usual token left to others; within [-14, 0].

    Short answers crowd at certainty, where the mean hardly tells .99 from .9999 and this does.
    """
    probability = math.exp(min(0.0, max(LOGPROB_FLOOR, mean_logprob)))
    return math.log(max(_DOUBT_MIN, 1.0 - probability))


def truncated_entropy(top_logprobs: Iterable[float]) -> float | None:
    """Entropy in nats of one token's ``ENTROPY_TOP`` likeliest alternatives and of the rest.

    All that is not among them counts as one further alternative, so this is a lower bound of the
    whole distribution's entropy. None with fewer alternatives: the number would be another one.
    """
    ranked = sorted((v for v in top_logprobs if not math.isnan(v)), reverse=True)[:ENTROPY_TOP]
    if len(ranked) < ENTROPY_TOP:
        return None
    shares = [math.exp(min(0.0, value)) for value in ranked]
    known = sum(shares)
    rest = max(0.0, 1.0 - known)
    total = known + rest
    if total <= 0.0 or math.isinf(total):
        return None
    parts = (share / total for share in (*shares, rest) if share > 0.0)
    return max(0.0, -sum(part * math.log(part) for part in parts))


def _quantile(ranked: Sequence[float], share: float) -> float:
    place = share * (len(ranked) - 1)
    below = int(place)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (place - below) * (ranked[above] - ranked[below])
