"""What the token log-probabilities of an answer, or of its beginning, say of it. Pure.

A mean hides one doubtful token in a sure answer, which a minimum or a low quantile shows ("Language
Model Cascades: Token-level uncertainty and beyond", 2404.10136, section 4). Gateways read these
features at every judgement, so they are plain arithmetic; what fits their weights
(``policies.calibration_fit``) reads the same function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Final

__all__ = ["LOGPROB_FLOOR", "AnswerFeatures", "answer_features"]

LOGPROB_FLOOR: Final = -20.0
"""APIs report -inf for a token outside their table."""


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


def _quantile(ranked: Sequence[float], share: float) -> float:
    place = share * (len(ranked) - 1)
    below = int(place)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (place - below) * (ranked[above] - ranked[below])
