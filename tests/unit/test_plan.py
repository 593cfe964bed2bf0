from __future__ import annotations

import pytest

from experts.errors import (
    BudgetExceeded,
    DeadlineUnreachable,
    HostUnavailable,
    NoEligibleExpert,
)
from experts.types import Capability, ExpertSpec, Price, SourceKind, Usage
from policies.money import actual_cost, settle, worst_case
from policies.plan import make_plan, plan_in_order
from policies.types import (
    AcceptanceRule,
    Calibration,
    Candidate,
    Caps,
    Overrides,
    Plan,
    Policy,
    Route,
    Stage,
    StreamWindow,
)

FIT = Calibration(4.0, 1.0)
LOGPROBS = frozenset({Capability.CHAT, Capability.LOGPROBS})


def candidate(
    name: str,
    cost: int,
    *,
    available: bool = True,
    wait_ms: float = 0.0,
    capabilities: frozenset[Capability] = LOGPROBS,
) -> Candidate:
    """An expert whose call costs ``cost`` micro-dollars at one million output tokens."""
    spec = ExpertSpec(name, SourceKind.SCRIPTED, "echo", Price(0, cost), 4096, capabilities)
    return Candidate(spec, available, wait_ms)


def policy(stages: int = 3, cost: int = 1000, fallbacks: tuple[str, ...] = ("spare",)) -> Policy:
    return Policy(
        name="p",
        digest="d",
        routes={"math": Route(("small", "medium", "large"))},
        default=Route(("medium",)),
        fallbacks=fallbacks,
        min_confidence=0.6,
        calibrations={"small": FIT, "medium": FIT},
        window=StreamWindow(16, 1500),
        caps=Caps(stages, cost, 10_000),
        max_output_tokens_default=64,
    )


POOL = [candidate("large", 100), candidate("medium", 20), candidate("small", 5)]


def plan(
    pool: list[Candidate],
    policy_: Policy | None = None,
    category: str = "math",
    cost: int | None = None,
    deadline_ms: float | None = None,
    exclusions: dict[str, str] | None = None,
) -> Plan:
    return make_plan(
        policy_ or policy(),
        category,
        pool,
        prompt_tokens=0,
        max_output_tokens=1_000_000,
        overrides=Overrides(cost, deadline_ms),
        exclusions=exclusions,
    )


def names(result: Plan) -> list[str]:
    return [stage.expert for stage in result.stages]


def test_the_route_in_its_order_with_rules_on_all_but_the_last() -> None:
    result = plan(POOL)
    rule = AcceptanceRule(0.6, FIT)
    assert result.stages == (Stage("small", rule), Stage("medium", rule), Stage("large", None))
    assert result.stage_costs_micro_usd == (5, 20, 100)
    assert result.worst_case_micro_usd == 125
    assert (result.policy, result.policy_digest, result.category) == ("p", "d", "math")
    assert result.notes == ()


def test_a_category_without_a_route_takes_the_default() -> None:
    assert names(plan(POOL, category="general")) == ["medium"]


def test_the_stage_cap_keeps_the_first_and_makes_the_last_kept_final() -> None:
    result = plan(POOL, policy(stages=2))
    assert names(result) == ["small", "medium"]
    assert result.stages[-1].accept is None
    assert result.notes == ("large: the cap of 2 stages is reached",)


def test_the_money_cap_is_on_the_sum_of_worst_cases() -> None:
    assert names(plan(POOL, cost=125)) == ["small", "medium", "large"]
    assert names(plan(POOL, cost=124)) == ["small", "medium"]
    assert names(plan(POOL, cost=24)) == ["small"]
    assert plan(POOL, cost=24).caps.cost_micro_usd == 24


def test_overrides_tighten_and_never_widen() -> None:
    caps = plan(POOL, cost=10**9, deadline_ms=10**9).caps
    assert caps == Caps(3, 1000, 10_000)
    assert plan(POOL, deadline_ms=500).caps.deadline_ms == 500


def test_an_unavailable_expert_is_left_out_with_a_note() -> None:
    pool = [candidate("small", 5), candidate("medium", 20, available=False)]
    result = plan(pool, exclusions={"large": "cannot do tools"})
    assert names(result) == ["small"]
    assert result.stages[0].accept is None
    assert result.notes == ("medium: no live host", "large: cannot do tools")


def test_expected_waits_add_up_against_the_deadline() -> None:
    pool = [
        candidate("small", 5, wait_ms=400),
        candidate("medium", 20, wait_ms=700),
        candidate("large", 100, wait_ms=500),
    ]
    result = plan(pool, deadline_ms=1000)
    assert names(result) == ["small", "large"]
    assert result.notes == ("medium: would start after 1100 ms of 1000 ms",)


def test_an_expert_that_cannot_be_judged_is_final() -> None:
    pool = [candidate("small", 5, capabilities=frozenset({Capability.CHAT})), *POOL[:2]]
    result = plan(pool)
    assert result.stages == (Stage("small", None),)
    assert "cannot be judged" in result.notes[0]


def test_fallbacks_serve_in_the_policys_order_when_the_route_is_empty() -> None:
    pool = [candidate("b", 1), candidate("a", 1), candidate("small", 5, available=False)]
    result = plan(pool, policy(fallbacks=("gone", "a", "b")))
    assert result.stages == (Stage("a", None), Stage("b", None))
    assert result.notes[-1] == "a: fallback, the route has nobody left"


def test_fallbacks_stand_behind_the_route_in_case_it_fails() -> None:
    pool = [candidate("large", 100), candidate("spare", 1), candidate("dear", 120)]
    result = plan(pool, policy(fallbacks=("spare", "dear")))
    assert result.stages == (Stage("large", None), Stage("spare", None), Stage("dear", None))
    assert result.worst_case_micro_usd == 120, "only one of them will have generated anything"
    assert names(plan(pool, policy(fallbacks=("spare", "dear")), cost=110)) == ["large", "spare"]
    assert names(plan(pool, policy(stages=1))) == ["large"], "the cap on stages counts them"


def test_a_draft_is_paid_for_before_a_fallback_runs() -> None:
    pool = [candidate("small", 5), candidate("large", 100), candidate("spare", 110)]
    assert names(plan(pool, cost=115)) == ["small", "large", "spare"]
    assert names(plan(pool, cost=114)) == ["small", "large"]


def test_nobody_eligible_says_why_for_each() -> None:
    with pytest.raises(NoEligibleExpert) as caught:
        plan([], exclusions={"small": "on the deny list", "elsewhere": "cannot do chat"})
    assert caught.value.exclusions["small"] == "on the deny list"
    assert caught.value.exclusions["elsewhere"] == "cannot do chat"
    assert set(caught.value.exclusions) == {"small", "medium", "large", "spare", "elsewhere"}


def test_merely_unavailable_is_not_now() -> None:
    with pytest.raises(HostUnavailable) as caught:
        plan([candidate("medium", 20, available=False)])
    assert caught.value.expert == "medium"


@pytest.mark.parametrize(("cap", "scope"), [(4, "request"), (None, "policy")])
def test_too_little_money_names_the_cheapest_and_whose_cap_it_is(
    cap: int | None, scope: str
) -> None:
    with pytest.raises(BudgetExceeded) as caught:
        plan(POOL, policy(cost=4 if cap is None else 1000), cost=cap)
    assert (caught.value.scope, caught.value.needed_micro_usd) == (scope, 5)
    assert caught.value.left_micro_usd == 4


def test_too_slow_reports_the_shortest_wait() -> None:
    pool = [candidate("small", 5, wait_ms=3000), candidate("spare", 5, wait_ms=2000)]
    with pytest.raises(DeadlineUnreachable) as caught:
        plan(pool, deadline_ms=1000)
    assert (caught.value.expert, caught.value.wait_ms) == ("spare", 2000)


def test_money_that_is_just_enough_is_not_the_obstacle() -> None:
    with pytest.raises(DeadlineUnreachable):
        plan([candidate("small", 5, wait_ms=3000)], cost=5, deadline_ms=1000)


def single(one: Candidate, cost: int | None = None, deadline_ms: float | None = None) -> Plan:
    return plan_in_order(
        policy(),
        [one],
        prompt_tokens=0,
        max_output_tokens=1_000_000,
        overrides=Overrides(cost, deadline_ms),
    )


def test_a_named_expert_is_that_expert_or_an_error() -> None:
    assert single(candidate("any", 7)).stages == (Stage("any", None),)
    with pytest.raises(HostUnavailable):
        single(candidate("any", 7, available=False))
    with pytest.raises(BudgetExceeded):
        single(candidate("any", 7), cost=6)
    with pytest.raises(DeadlineUnreachable):
        single(candidate("any", 7, wait_ms=50), deadline_ms=50)


def test_named_alternatives_stand_in_for_each_other_within_the_caps() -> None:
    in_order = [candidate("a", 7), candidate("down", 1, available=False), candidate("b", 3)]
    made = plan_in_order(
        policy(),
        in_order,
        prompt_tokens=0,
        max_output_tokens=1_000_000,
        overrides=Overrides(10, None),
    )
    assert made.stages == (Stage("a", None), Stage("b", None))
    assert made.worst_case_micro_usd == 7
    assert made.notes == ("down: no live host",)


def test_money_rounds_up_per_call_and_settles_both_ways() -> None:
    spec = ExpertSpec("e", SourceKind.SCRIPTED, "echo", Price(20_000, 60_000), 4096, LOGPROBS)
    assert worst_case(spec, 100, 256) == 18  # 2 + 15.36
    assert actual_cost(spec, Usage(100, 0)) == 2
    assert settle(18, 5).refund_micro_usd == 13
    assert settle(5, 18).overrun_micro_usd == 13
    with pytest.raises(ValueError, match="negative"):
        worst_case(spec, -1, 0)
