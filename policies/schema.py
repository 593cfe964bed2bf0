"""The shape of a policy file, as pydantic models."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from experts.quantities import Usd
from experts.strict_yaml import Section

MAX_STAGES = 8


def _one_or_many(value: Any) -> Any:
    """``sql`` is short for ``[sql]``; a list becomes a tuple; a repetition is refused."""
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError("expected an expert or a list of experts, cheapest first")
    if len(set(value)) != len(value):
        raise ValueError("names an expert twice")
    return tuple(value)


RouteExperts = Annotated[
    tuple[str, ...],
    BeforeValidator(_one_or_many),
    Field(min_length=1, max_length=MAX_STAGES),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {"type": "string"},
                    "minItems": 1,
                    "maxItems": MAX_STAGES,
                    "uniqueItems": True,
                },
            ],
            "description": "One expert, or a cascade with the cheapest first.",
        }
    ),
]


Weight = Annotated[float, Field(ge=0, le=1000)]
Penalty = Annotated[float, Field(ge=-1000, le=0)]
Offset = Annotated[float, Field(ge=-1000, le=1000)]


class EntropySection(Section):
    """Weights of the entropy of what else each token could have been; it never adds confidence."""

    mean: Penalty = 0.0
    maximum: Penalty = 0.0
    quantile_90: Penalty = 0.0
    missing: Offset = Field(0.0, description="In their place where there are no alternatives.")


class LengthSection(Section):
    """Weight of the logarithm of a whole answer's tokens."""

    weight: Offset
    missing: Offset = Field(0.0, description="In its place while an answer has not ended.")


class AgreementSection(Section):
    """Weight of the agreement with the whole answers of earlier stages, 0 to 1."""

    weight: Weight
    missing: Offset = Field(0.0, description="In its place where no earlier stage answered.")


class PrefixCalibrationSection(Section):
    """Platt scaling; a higher log-probability may not lower the confidence.

    ``slope`` weighs the mean over the tokens; the others weigh the least of them, the first, and
    quantiles.
    """

    slope: float = Field(gt=0, le=1000)
    intercept: Offset
    minimum: Weight = 0.0
    first: Weight = 0.0
    quantile_10: Weight = 0.0
    quantile_25: Weight = 0.0
    quantile_50: Weight = 0.0
    doubt: Penalty = Field(0.0, description="Of ln(1 - e^mean): how far from certain it is.")
    entropy: EntropySection | None = None
    by_category: dict[str, Offset] = Field(
        default_factory=dict, description="Category to what is added to the sum for its answers."
    )


class CalibrationSection(PrefixCalibrationSection):
    """Platt scaling of whole answers; ``prefix`` is that of answers judged before they end."""

    length: LengthSection | None = None
    agreement: AgreementSection | None = None
    prefix: PrefixCalibrationSection | None = None


class WindowSection(Section):
    """How much of a streamed draft is held back: whichever passes first."""

    tokens: int = Field(8, ge=1, le=4096)  # bench/streaming_commit.py: more tokens tell no more
    hold_ms: float = Field(1500, ge=0, le=60_000)


class CascadeSection(Section):
    """When a stage's answer is good enough to be the answer."""

    min_confidence: float = Field(0.6, ge=0, le=1)
    calibration: dict[str, CalibrationSection] = Field(default_factory=dict)
    stream_window: WindowSection = WindowSection()


class CapsSection(Section):
    """Hard bounds of one request. There is no default for money."""

    stages: int = Field(2, ge=1, le=MAX_STAGES)
    cost_usd: Usd
    deadline_ms: float = Field(60_000, gt=0, le=86_400_000)


class OutageSection(Section):
    """What happens while the state store is away: go on, or refuse."""

    routing: Literal["open", "closed"] = "open"
    budgets: Literal["open", "closed"] = "closed"


class AffinitySection(Section):
    """Whether a conversation stays with the expert that knows it already."""

    mode: Literal["off", "prefer", "strict"] = "prefer"
    ttl_s: int = Field(1_800, ge=1, le=30 * 86_400)
    quality_worth_ms: float = Field(5_000, ge=0, le=3_600_000)
    prefill_ms_per_token: float = Field(0.2, ge=0, le=1_000)


class ExploreSection(Section):
    """Trying the policy's other experts, by Thompson sampling over what feedback says."""

    share: float = Field(0, ge=0, le=1, description="Of requests; 0: never.")


Probability = Annotated[float, Field(ge=0, le=1)]
Move = Annotated[float, Field(ge=-1, le=1)]


class PerQuerySection(Section):
    """Ranks experts for every query by quality, money and expected latency."""

    quality_per_usd: float = Field(
        ge=0, le=1e9, description="Quality, 0 to 1, that one US dollar is worth."
    )
    quality_per_s: float = Field(
        0, ge=0, le=1e6, description="Quality that one second of waiting is worth."
    )
    output_tokens_expected: int = Field(256, ge=1, le=1_000_000)
    quality: dict[str, dict[str, Probability]] = Field(
        description="Category to expert to estimated quality; with a row named general."
    )
    confidence_sd: dict[str, Probability] = Field(default_factory=dict)
    confidence_moves: dict[str, dict[str, Move]] = Field(
        default_factory=dict,
        description="Draft to another expert to how far the draft's answer moves its estimate.",
    )


class PolicyFile(Section):
    """A policy file; its name is the file's stem."""

    version: Literal[1]
    description: str = ""
    routes: dict[str, RouteExperts] = Field(default_factory=dict)
    default: RouteExperts
    fallbacks: tuple[str, ...] = ()
    required_tags: frozenset[str] = Field(
        default=frozenset(), description="Only experts with all of these tags may answer."
    )
    per_query: PerQuerySection | None = None
    cascade: CascadeSection = CascadeSection()
    affinity: AffinitySection = AffinitySection()
    explore: ExploreSection = ExploreSection()
    caps: CapsSection
    max_output_tokens_default: int = Field(256, ge=1, le=1_000_000)
    on_state_outage: OutageSection = OutageSection()
