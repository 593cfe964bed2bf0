"""Types of the policy layer: what a policy decides (a plan) and what a cascade is told and answers.

Frozen data, no behaviour beyond arithmetic. Money is integer micro-dollars, times are milliseconds
on the caller's clock.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from experts.types import ExpertSpec
from policies.calibration import Calibration as Calibration
from policies.calibration import Evidence as Evidence


@dataclass(frozen=True, slots=True)
class Following:
    """How far a stage's bound moves with what the answer before it said of itself.

    The bound rises by ``per_confidence`` for every unit by which that answer's confidence lay above
    ``expected``; errors of experts go together, so a doubtful first answer lowers what the next
    ones are worth.
    """

    per_confidence: float
    expected: float


@dataclass(frozen=True, slots=True)
class AcceptanceRule:
    """Accept a stage's answer when its calibrated confidence reaches ``min_confidence``."""

    min_confidence: float
    calibration: Calibration
    following: Following | None = None

    def bound(self, previous_confidence: float | None) -> float:
        """The confidence to reach, behind an answer of this one; None: it said nothing."""
        if self.following is None or previous_confidence is None:
            return self.min_confidence
        news = previous_confidence - self.following.expected
        return min(1.0, max(0.0, self.min_confidence + self.following.per_confidence * news))


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

    Stages that are judged come first; of those that are not, each is an alternative to the one
    before it, to be tried if that failed before its first token. ``worst_case_micro_usd`` is what
    the judged ones and the dearest alternative cost together if each runs to its last token; it is
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
    terms: tuple[ExpertTerms, ...] = ()  # of a per-query policy, best value first

    @property
    def worst_case_micro_usd(self) -> int:
        priced = tuple(zip(self.stages, self.stage_costs_micro_usd, strict=True))
        judged = sum(cost for stage, cost in priced if stage.accept is not None)
        return judged + max((cost for stage, cost in priced if stage.accept is None), default=0)

    @property
    def answers_max(self) -> int:
        """How many stages can generate anything: alternatives count once."""
        judged = sum(stage.accept is not None for stage in self.stages)
        return judged + (judged < len(self.stages))


@dataclass(frozen=True, slots=True)
class Candidate:
    """An eligible expert with its live state.

    ``why_not`` and ``retry_after_ms`` go with ``available`` False; empty: it has no live host.
    """

    spec: ExpertSpec
    available: bool = True
    expected_wait_ms: float = 0.0
    resident: bool = False
    why_not: str = ""
    retry_after_ms: float = 5_000.0


@dataclass(frozen=True, slots=True)
class Overrides:
    """A request's own bounds (``extra_body.coe``); they can tighten a policy, never widen it."""

    max_cost_micro_usd: int | None = None
    deadline_ms: float | None = None


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
class Affinity:
    """Whether a conversation stays with its expert. ``mode``: off, prefer or strict.

    ``quality_worth_ms``: how long a caller would wait for the right expert instead of a wrong one.
    ``prefill_ms_per_token``: what it takes an expert to read one token of a prompt.
    """

    mode: str = "prefer"
    ttl_s: int = 1_800
    quality_worth_ms: float = 5_000.0
    prefill_ms_per_token: float = 0.2


@dataclass(frozen=True, slots=True)
class PerQuery:
    """The objective quality - quality_per_usd · USD - quality_per_s · s, and what it rests on.

    ``quality``: category -> expert -> estimated quality 0..1, a row "general" among them.
    ``confidence_sd``: by how much an expert's answer moves the estimate of its own quality, as a
    standard deviation; experts without one never draft. ``confidence_moves``: draft -> expert -> by
    how much the same answer moves the estimate of that other expert's, signed.
    """

    quality_per_usd: float
    quality_per_s: float
    output_tokens_expected: int
    quality: Mapping[str, Mapping[str, float]]
    confidence_sd: Mapping[str, float] = field(default_factory=dict)
    confidence_moves: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def moves(self, draft: str, other: str) -> float:
        """Of the estimate of ``other``, by one standard deviation of the draft's news."""
        if draft == other:
            return self.confidence_sd.get(draft, 0.0)
        return self.confidence_moves.get(draft, {}).get(other, 0.0)

    @property
    def experts(self) -> tuple[str, ...]:
        """Every expert with an estimate, each once."""
        return tuple(dict.fromkeys(name for row in self.quality.values() for name in row))

    def at_price(self, quality_per_usd: float) -> PerQuery:
        """The same rule at another price of money."""
        return replace(self, quality_per_usd=quality_per_usd)


@dataclass(frozen=True, slots=True)
class ExpertTerms:
    """One expert's place in the objective, for a query and the state of this moment.

    value = quality - money_term - latency_term. ``from_router``: the estimate is for this very
    query, not its category's.
    """

    expert: str
    quality: float
    cost_micro_usd: int
    expected_wait_ms: float
    resident: bool
    money_term: float
    latency_term: float
    value: float
    from_router: bool


@dataclass(frozen=True, slots=True)
class Policy:
    """A validated policy file. ``digest`` is the first 16 hex digits of its canonical SHA-256.

    ``calibrations`` is keyed by expert; an expert without one cannot be an accepting stage.
    ``default`` serves categories that ``routes`` does not name, "general" among them.
    ``fallbacks`` are tried, in order, when every expert of a route is unavailable or ineligible.
    ``required_tags``: experts without all of them are ineligible, whoever asks. ``explore_share``:
    share of requests whose first expert is drawn by what feedback says of the policy's experts.
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
    required_tags: frozenset[str] = frozenset()
    description: str = ""
    affinity: Affinity = field(default_factory=Affinity)
    explore_share: float = 0.0
    per_query: PerQuery | None = None
    named_experts: tuple[str, ...] = field(init=False, repr=False, compare=False)
    """Every expert that the policy could lead to, each once; collected once, asked per request."""

    def __post_init__(self) -> None:
        routes = (*self.routes.values(), self.default)
        on_routes = (name for route in routes for name in route.experts)
        ranked = self.per_query.experts if self.per_query is not None else ()
        named = tuple(dict.fromkeys((*ranked, *on_routes, *self.fallbacks)))
        object.__setattr__(self, "named_experts", named)

    def with_only_route(self, experts: tuple[str, ...]) -> Policy:
        """The same policy, with one route for all categories."""
        return replace(self, routes={}, default=Route(experts), per_query=None)
