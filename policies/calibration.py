"""From what is known of an answer to P(the answer is good): evidence, and how a policy weighs it.

Pure. A calibration is logistic (Platt, "Probabilistic outputs for support vector machines", 1999,
section 2): confidence = 1 / (1 + exp(-z)), z a weighted sum of features. Features that an answer
may lack come in groups, each with a fitted ``missing`` that stands in its place, so that an answer
without them is judged by what it has, and calibrated as such.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from policies.answer_features import answer_features, entropy_features, log_doubt

__all__ = ["Calibration", "EntropyWeights", "Evidence", "OneWeight"]


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a stage's answer so far. ``logprob_sum`` runs over ``logprob_tokens``.

    ``logprobs`` are the tokens' own, in their order; of several choices, those of the weakest.
    ``entropies`` (nats, ``policies.answer_features.truncated_entropy``) belong to the same tokens
    and are empty unless the expert gave alternatives for each. ``agreement``, 0 to 1, is that with
    the whole answers of earlier stages (``policies.agreement``), None where there is none.

    ``logprob_tokens`` may be 0 when the expert reports none: such evidence can never be accepted
    by a rule, because silence is not confidence.
    """

    logprob_sum: float
    logprob_tokens: int
    finished: bool
    elapsed_ms: float
    logprobs: tuple[float, ...] = ()
    entropies: tuple[float, ...] = ()
    agreement: float | None = None

    @property
    def mean_logprob(self) -> float | None:
        return self.logprob_sum / self.logprob_tokens if self.logprob_tokens else None

    @property
    def log_tokens(self) -> float | None:
        """Natural logarithm of a whole answer's length; how long another will be is not known."""
        return math.log(self.logprob_tokens) if self.finished and self.logprob_tokens else None


@dataclass(frozen=True, slots=True)
class EntropyWeights:
    """Of ``EntropyFeatures``, none above 0; ``missing`` stands for them where there are none."""

    mean: float = 0.0
    maximum: float = 0.0
    quantile_90: float = 0.0
    missing: float = 0.0

    def term(self, evidence: Evidence) -> float:
        if not evidence.entropies:
            return self.missing
        weights = (self.mean, self.maximum, self.quantile_90)
        values = entropy_features(evidence.entropies).values()
        return sum(w * v for w, v in zip(weights, values, strict=True))


@dataclass(frozen=True, slots=True)
class OneWeight:
    """Of a single feature; ``missing`` stands for it where there is none."""

    weight: float
    missing: float = 0.0

    def term(self, value: float | None) -> float:
        return self.missing if value is None else self.weight * value


@dataclass(frozen=True, slots=True)
class Calibration:
    """z = slope · mean + Σ weight · feature + groups + by_category[category] + intercept.

    ``slope`` weighs the mean of the token log-probabilities, the next six what else
    ``policies.answer_features`` makes of them, ``doubt`` its ``log_doubt``. A group that is None is
    not read. ``prefix`` judges answers that have not ended, if there is one.
    """

    slope: float
    intercept: float
    minimum: float = 0.0
    first: float = 0.0
    quantile_10: float = 0.0
    quantile_25: float = 0.0
    quantile_50: float = 0.0
    doubt: float = 0.0
    entropy: EntropyWeights | None = None
    length: OneWeight | None = None
    agreement: OneWeight | None = None
    by_category: Mapping[str, float] = field(default_factory=dict)
    prefix: Calibration | None = None

    def confidence(self, evidence: Evidence) -> float | None:
        """None where nothing is known that this calibration reads."""
        if self.prefix is not None and not evidence.finished:
            return self.prefix.confidence(evidence)
        z = self.log_odds(evidence)
        return None if z is None else _sigmoid(z)

    def log_odds(self, evidence: Evidence) -> float | None:
        """z, by this calibration itself whether the answer has ended or not."""
        mean = evidence.mean_logprob
        if mean is None:
            return None
        z = self.slope * mean + self.intercept
        if any(self.further_weights):
            if not evidence.logprobs:
                return None
            _, *values = answer_features(evidence.logprobs).values()
            z += sum(w * v for w, v in zip(self.further_weights, values, strict=True))
        if self.doubt:
            z += self.doubt * log_doubt(mean)
        if self.entropy is not None:
            z += self.entropy.term(evidence)
        if self.length is not None:
            z += self.length.term(evidence.log_tokens)
        if self.agreement is not None:
            z += self.agreement.term(evidence.agreement)
        return z

    def for_category(self, category: str) -> Calibration:
        """The calibration of one category's answers; the same one where it has no offset."""
        prefix = self.prefix.for_category(category) if self.prefix is not None else None
        offset = self.by_category.get(category, 0.0)
        if not offset and prefix is self.prefix:
            return self
        return replace(self, intercept=self.intercept + offset, by_category={}, prefix=prefix)

    @property
    def further_weights(self) -> tuple[float, ...]:
        """Of the features behind the mean, in their order."""
        quantiles = (self.quantile_10, self.quantile_25, self.quantile_50)
        return (self.minimum, self.first, *quantiles)

    @property
    def reads_entropy(self) -> bool:
        """Whether experts have to be asked for alternatives."""
        return self.entropy is not None or (self.prefix is not None and self.prefix.reads_entropy)


def _sigmoid(z: float) -> float:
    if z >= 0:
        return 1.0 / (1.0 + math.exp(-z))
    e = math.exp(z)
    return e / (1.0 + e)
