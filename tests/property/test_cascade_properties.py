from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from policies.cascade import Cascade
from policies.types import (
    AcceptanceRule,
    Attempt,
    Calibration,
    Caps,
    Evidence,
    Plan,
    Stage,
    StreamWindow,
    Verdict,
)

WINDOW = StreamWindow(tokens=8, hold_ms=50)


@st.composite
def plans(draw: st.DrawFn, min_confidence: float | None = None, stages_min: int = 1) -> Plan:
    """Plans as ``make_plan`` makes them: the worst cases fit the caps together."""
    costs = tuple(draw(st.lists(st.integers(0, 50), min_size=stages_min, max_size=4)))
    bound = draw(st.floats(0, 1)) if min_confidence is None else min_confidence
    fit = st.builds(Calibration, st.floats(0.1, 20), st.floats(-10, 10))
    stages = [Stage(f"e{i}", AcceptanceRule(bound, draw(fit))) for i in range(len(costs) - 1)]
    return Plan(
        policy="p",
        policy_digest="d",
        category="c",
        stages=(*stages, Stage("last", None)),
        caps=Caps(draw(st.integers(len(costs), 5)), sum(costs) + draw(st.integers(0, 20)), 1000.0),
        window=WINDOW,
        stage_costs_micro_usd=costs,
    )


evidence = st.builds(
    Evidence,
    logprob_sum=st.floats(-500, 0),
    logprob_tokens=st.integers(0, 30),
    finished=st.booleans(),
    elapsed_ms=st.floats(0, 100),
)
events = st.lists(
    st.tuples(
        st.sampled_from(("next", "judge", "fail", "spend")),
        st.floats(0, 300),
        evidence,
        st.floats(0, 1),
    ),
    max_size=25,
)


@settings(deadline=None)
@given(plans(), events)
def test_no_sequence_of_events_breaks_a_cap(plan: Plan, script: list[tuple[object, ...]]) -> None:
    """Any order of calls, as long as each stage costs at most its worst case."""
    cascade = Cascade(plan, started_ms=0.0)
    now_ms, attempts, settled, accepted = 0.0, 0, True, False
    for name, wait_ms, seen, share in script:
        assert isinstance(wait_ms, float)
        assert isinstance(seen, Evidence)
        assert isinstance(share, float)
        now_ms += wait_ms
        if name == "next" and not accepted:
            step = cascade.next_attempt(now_ms)
            if isinstance(step, Attempt):
                assert step.index == attempts
                assert 0 < step.timeout_ms == plan.caps.deadline_ms - now_ms
                attempts, settled = attempts + 1, False
        elif name == "judge" and attempts:
            accepted = cascade.judge(seen) is Verdict.ACCEPT
        elif name == "fail" and attempts:
            cascade.record_failure()
            settled, accepted = True, False
        elif name == "spend" and not settled:
            cascade.spend(int(share * plan.stage_costs_micro_usd[attempts - 1]))
            settled = True
        assert cascade.stages_run == attempts <= plan.caps.stages
        assert cascade.spent_micro_usd <= plan.caps.cost_micro_usd


@settings(deadline=None)
@given(plans(), st.lists(st.integers(0, 200), min_size=1, max_size=6))
def test_an_attempt_is_only_granted_if_its_worst_case_still_fits(
    plan: Plan, spends: list[int]
) -> None:
    """Even when stages cost more than was foreseen."""
    cascade = Cascade(plan, started_ms=0.0)
    for spent in spends:
        before = cascade.spent_micro_usd
        step = cascade.next_attempt(0.0)
        if not isinstance(step, Attempt):
            break
        assert before + plan.stage_costs_micro_usd[step.index] <= plan.caps.cost_micro_usd
        cascade.spend(spent)


informative = evidence.filter(lambda seen: seen.logprob_tokens > 0)


@settings(deadline=None)
@given(plans(min_confidence=0.0, stages_min=2), informative)
def test_confidence_zero_accepts_the_first_stage(plan: Plan, seen: Evidence) -> None:
    cascade = Cascade(plan, started_ms=0.0)
    cascade.next_attempt(0.0)
    assert cascade.judge(seen) in {Verdict.ACCEPT, Verdict.WAIT}


@settings(deadline=None)
@given(plans(min_confidence=1.01), informative)
def test_confidence_above_one_accepts_the_last_stage_only(plan: Plan, seen: Evidence) -> None:
    cascade = Cascade(plan, started_ms=0.0)
    while isinstance(step := cascade.next_attempt(0.0), Attempt):
        verdict = cascade.judge(seen)
        assert (verdict is Verdict.ACCEPT) == step.is_last
        if step.is_last:
            break
        cascade.spend(0)
    assert cascade.stages_run == len(plan.stages)


@settings(deadline=None)
@given(plans(stages_min=2), informative, st.floats(-5, 0))
def test_better_evidence_never_turns_acceptance_into_escalation(
    plan: Plan, seen: Evidence, worse_by: float
) -> None:
    assume(seen.finished)

    def verdict(logprob_sum: float) -> Verdict:
        cascade = Cascade(plan, started_ms=0.0)
        cascade.next_attempt(0.0)
        return cascade.judge(
            Evidence(logprob_sum, seen.logprob_tokens, seen.finished, seen.elapsed_ms)
        )

    if verdict(seen.logprob_sum + worse_by) is Verdict.ACCEPT:
        assert verdict(seen.logprob_sum) is Verdict.ACCEPT
