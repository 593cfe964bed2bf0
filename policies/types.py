"""Types of the policy layer: what a policy decides (a plan) and what a cascade is told and answers.

Frozen data, no behaviour beyond arithmetic. Money is integer micro-dollars, times are milliseconds
on the caller's clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from experts.types import ExpertSpec


@dataclass(frozen=True, slots=True)
class Calibration:
    """Platt scaling of an answer's mean token log-probability to P(good answer).

    confidence = 1 / (1 + exp(-(slope * mean_logprob + intercept))). Platt, "Probabilistic outputs
    for support vector machines", 1999, section 2.
    """

    slope: float
    intercept: float

    def confidence(self, mean_logprob: float) -> float:
        z = self.slope * mean_logprob + self.intercept
        if z >= 0:
            return 1.0 / (1.0 + math.exp(-z))
        e = math.exp(z)
        return e / (1.0 + e)


@dataclass(frozen=True, slots=True)
class AcceptanceRule:
    """Accept a stage's answer when its calibrated confidence reaches ``min_confidence``."""

    min_confidence: float
    calibration: Calibration


@dataclass(frozen=True, slots=True)
class Stage:
    """One expert of a plan. ``accept`` None: whatever it answers is the answer."""

    expert: str
    accept: AcceptanceRule | None = None


@dataclass(frozen=True, slots=True)
class StreamWindow:
    """How much of a streamed draft is held back before it is judged: first of the two to pass."""

    tokens: int
    hold_ms: float


@dataclass(frozen=True, slots=True)
class Caps:
    """Hard bounds of one request, fixed before the first call."""

    stages: int
    cost_micro_usd: int
    deadline_ms: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Ordered stages with the bounds they run under.

    ``worst_case_micro_usd`` is what all stages cost together if each runs to its last token; it is
    at most ``caps.cost_micro_usd`` by construction, so reserving it can never overspend.
    ``stage_costs_micro_usd[i]`` is the share of stage i. ``notes`` says in words why experts were
    left out or the map was departed from.
    """

    policy: str
    policy_digest: str
    category: str
    stages: tuple[Stage, ...]
    caps: Caps
    window: StreamWindow
    stage_costs_micro_usd: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def worst_case_micro_usd(self) -> int:
        return sum(self.stage_costs_micro_usd)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An eligible expert with its live state."""

    spec: ExpertSpec
    available: bool = True
    expected_wait_ms: float = 0.0
    resident: bool = False


@dataclass(frozen=True, slots=True)
class Overrides:
    """A request's own bounds (``extra_body.coe``); they can tighten a policy, never widen it."""

    max_cost_micro_usd: int | None = None
    deadline_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known of a stage's answer so far. ``logprob_sum`` runs over ``logprob_tokens``.

    ``logprob_tokens`` may be 0 when the expert reports none: such evidence can never be accepted
    by a rule, because silence is not confidence.
    """

    logprob_sum: float
    logprob_tokens: int
    finished: bool
    elapsed_ms: float

    @property
    def mean_logprob(self) -> float | None:
        return self.logprob_sum / self.logprob_tokens if self.logprob_tokens else None


class Verdict(StrEnum):
    WAIT = "wait"  # the window is not full yet
    ACCEPT = "accept"
    ESCALATE = "escalate"


@dataclass(frozen=True, slots=True)
class Attempt:
    """Run this stage now, within this time."""

    index: int
    stage: Stage
    timeout_ms: float
    is_last: bool


@dataclass(frozen=True, slots=True)
class Exhausted:
    """No stage is left within the caps. ``reason``: "stages", "cost" or "deadline"."""

    reason: str


@dataclass(frozen=True, slots=True)
class Route:
    """One row of a policy's category map: the experts to try, in order, cheapest first."""

    experts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    """A validated policy file. ``digest`` is the first 16 hex digits of its canonical SHA-256.

    ``calibrations`` is keyed by expert; an expert without one cannot be an accepting stage.
    ``default`` serves categories that ``routes`` does not name, "general" among them.
    ``fallbacks`` are tried, in order, when every expert of a route is unavailable or ineligible.
    """

    name: str
    digest: str
    routes: Mapping[str, Route]
    default: Route
    fallbacks: tuple[str, ...]
    min_confidence: float
    calibrations: Mapping[str, Calibration]
    window: StreamWindow
    caps: Caps
    max_output_tokens_default: int
    on_state_outage: Mapping[str, str] = field(default_factory=dict)
    description: str = ""
