from __future__ import annotations

from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from experts.errors import BudgetExceeded, CoeError
from experts.types import Capability, ExpertSpec, Price, SourceKind
from policies.plan import make_plan
from policies.types import (
    Calibration,
    Candidate,
    Caps,
    Overrides,
    Plan,
    Policy,
    Route,
    StreamWindow,
)

NAMES = ("a", "b", "c", "d", "e")
PLAIN = frozenset({Capability.CHAT})

names = st.lists(st.sampled_from(NAMES), unique=True, max_size=5).map(tuple)


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    return [
        Candidate(
            ExpertSpec(
                name,
                SourceKind.SCRIPTED,
                "echo",
                Price(draw(st.integers(0, 50)), draw(st.integers(0, 50))),
                4096,
                draw(st.sampled_from((PLAIN, PLAIN | {Capability.LOGPROBS}))),
            ),
            available=draw(st.booleans()),
            expected_wait_ms=draw(st.floats(0, 100)),
        )
        for name in draw(names)
    ]


policies = st.builds(
    Policy,
    name=st.just("p"),
    digest=st.just("d"),
    routes=names.filter(bool).map(lambda route: {"math": Route(route)}),
    default=st.just(Route(("a",))),
    fallbacks=names,
    min_confidence=st.floats(0, 1),
    calibrations=names.map(lambda fitted: {name: Calibration(1.0, 0.0) for name in fitted}),
    window=st.just(StreamWindow(16, 100)),
    caps=st.builds(Caps, st.integers(1, 5), st.integers(0, 200), st.floats(1, 300)),
    max_output_tokens_default=st.just(64),
)


def plan(policy: Policy, pool: list[Candidate], overrides: Overrides) -> Plan:
    return make_plan(
        policy,
        "math",
        pool,
        prompt_tokens=400_000,
        max_output_tokens=600_000,
        overrides=overrides,
    )


def plan_or_none(policy: Policy, pool: list[Candidate], overrides: Overrides) -> Plan | None:
    try:
        return plan(policy, pool, overrides)
    except CoeError:
        return None


def outcome(policy: Policy, pool: list[Candidate]) -> Plan | CoeError:
    try:
        return plan(policy, pool, Overrides())
    except CoeError as error:
        return error


overrides = st.builds(
    Overrides,
    st.none() | st.integers(0, 200),
    st.none() | st.floats(1, 300),
)


@settings(deadline=None)
@given(policies, candidates(), overrides)
def test_a_plan_keeps_every_cap(
    policy: Policy, pool: list[Candidate], request_bounds: Overrides
) -> None:
    result = plan_or_none(policy, pool, request_bounds)
    assume(result is not None)
    assert result is not None
    by_id = {one.spec.id: one for one in pool}
    chosen = [by_id[stage.expert] for stage in result.stages]
    assert 1 <= len(chosen) <= policy.caps.stages
    assert result.worst_case_micro_usd <= result.caps.cost_micro_usd <= policy.caps.cost_micro_usd
    assert sum(one.expected_wait_ms for one in chosen) < result.caps.deadline_ms
    assert all(one.available for one in chosen)
    assert len(result.stage_costs_micro_usd) == len(result.stages)
    assert result.stages[-1].accept is None
    judged = [stage for stage in result.stages if stage.accept is not None]
    assert tuple(judged) == result.stages[: len(judged)], "alternatives come last"
    for stage in judged:
        assert Capability.LOGPROBS in by_id[stage.expert].spec.capabilities


@settings(deadline=None)
@given(policies, candidates(), overrides)
def test_a_plan_follows_the_route_and_then_the_fallbacks(
    policy: Policy, pool: list[Candidate], request_bounds: Overrides
) -> None:
    result = plan_or_none(policy, pool, request_bounds)
    assume(result is not None)
    assert result is not None
    chosen = [stage.expert for stage in result.stages]
    route = policy.routes["math"].experts
    judged = sum(stage.accept is not None for stage in result.stages)
    behind = [name for name in policy.fallbacks if name in chosen[judged:]]
    splits = [(chosen[:n], chosen[n:]) for n in (0, judged + 1)]
    assert any(
        mine == [name for name in route if name in mine]
        and theirs == [name for name in behind if name in theirs]
        for mine, theirs in splits
    )


@settings(deadline=None)
@given(policies, candidates(), overrides, st.integers(0, 200))
def test_a_lower_money_cap_never_gives_a_dearer_plan(
    policy: Policy, pool: list[Candidate], wide: Overrides, lower: int
) -> None:
    cap = policy.caps.cost_micro_usd if wide.max_cost_micro_usd is None else wide.max_cost_micro_usd
    tight = replace(wide, max_cost_micro_usd=min(lower, cap))
    tight_plan = plan_or_none(policy, pool, tight)
    assume(tight_plan is not None)
    wide_plan = plan_or_none(policy, pool, wide)
    assert tight_plan is not None
    assert wide_plan is not None, "what is affordable with less is affordable with more"
    assert tight_plan.worst_case_micro_usd <= wide_plan.worst_case_micro_usd


@settings(deadline=None)
@given(policies, candidates(), overrides, st.permutations(NAMES))
def test_renaming_experts_renames_the_plan(
    policy: Policy, pool: list[Candidate], request_bounds: Overrides, new_names: list[str]
) -> None:
    new = dict(zip(NAMES, new_names, strict=True))

    def renamed(route: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(new[name] for name in route)

    twin = replace(
        policy,
        routes={"math": Route(renamed(policy.routes["math"].experts))},
        fallbacks=renamed(policy.fallbacks),
        calibrations={new[name]: fit for name, fit in policy.calibrations.items()},
    )
    twin_pool = [replace(one, spec=replace(one.spec, id=new[one.spec.id])) for one in pool]
    one, other = (
        plan_or_none(policy, pool, request_bounds),
        plan_or_none(twin, twin_pool, request_bounds),
    )
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert renamed(tuple(s.expert for s in one.stages)) == tuple(s.expert for s in other.stages)
        assert one.stage_costs_micro_usd == other.stage_costs_micro_usd


@settings(deadline=None)
@given(policies, candidates())
def test_money_is_refused_only_when_no_single_expert_is_affordable(
    policy: Policy, pool: list[Candidate]
) -> None:
    by_id = {one.spec.id: one for one in pool}
    named = {*policy.routes["math"].experts, *policy.fallbacks} & by_id.keys()
    costs = [by_id[name].spec.price.cost_micro_usd(400_000, 600_000) for name in named]
    assume(costs)
    refused = isinstance(outcome(policy, pool), BudgetExceeded)
    assert refused == (min(costs) > policy.caps.cost_micro_usd)
