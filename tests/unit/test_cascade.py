from __future__ import annotations

import math

import pytest

from policies.cascade import Cascade
from policies.types import (
    AcceptanceRule,
    Attempt,
    Calibration,
    Caps,
    Evidence,
    Exhausted,
    Plan,
    Stage,
    StreamWindow,
    Verdict,
)

RULE = AcceptanceRule(0.6, Calibration(slope=4.0, intercept=2.0))
SURE = Evidence(logprob_sum=-0.16, logprob_tokens=16, finished=False, elapsed_ms=100)
UNSURE = Evidence(logprob_sum=-16.0, logprob_tokens=16, finished=False, elapsed_ms=100)


def cascade(cost: int = 30, stages: int = 3, deadline_ms: float = 1000) -> Cascade:
    plan = Plan(
        policy="p",
        policy_digest="d",
        category="math",
        stages=(Stage("a", RULE), Stage("b", RULE), Stage("c", None)),
        caps=Caps(stages, cost, deadline_ms),
        window=StreamWindow(tokens=16, hold_ms=500),
        stage_costs_micro_usd=(5, 10, 15),
    )
    return Cascade(plan, started_ms=100.0)


def started(**bounds: int) -> Cascade:
    running = cascade(**bounds)
    assert isinstance(running.next_attempt(100.0), Attempt)
    return running


def test_attempts_carry_the_time_that_is_left() -> None:
    running = cascade()
    assert running.next_attempt(100.0) == Attempt(0, Stage("a", RULE), 1000.0, False)
    running.spend(2)
    assert running.next_attempt(400.0) == Attempt(1, Stage("b", RULE), 700.0, False)
    running.spend(3)
    assert running.next_attempt(1099.0) == Attempt(2, Stage("c", None), 1.0, True)
    assert running.next_attempt(1099.0) == Exhausted("stages")
    assert (running.spent_micro_usd, running.stages_run) == (5, 3)


def test_a_sure_draft_is_accepted_and_an_unsure_one_escalated() -> None:
    assert started().judge(SURE) is Verdict.ACCEPT
    assert started().judge(UNSURE) is Verdict.ESCALATE


@pytest.mark.parametrize(
    ("tokens", "finished", "elapsed_ms", "verdict"),
    [
        (15, False, 499, Verdict.WAIT),
        (16, False, 0, Verdict.ACCEPT),
        (15, False, 500, Verdict.ACCEPT),
        (1, True, 0, Verdict.ACCEPT),
        (0, False, 499, Verdict.WAIT),
    ],
)
def test_the_window_ends_by_tokens_time_or_the_end_of_the_answer(
    tokens: int, finished: bool, elapsed_ms: float, verdict: Verdict
) -> None:
    evidence = Evidence(-0.01 * tokens, tokens, finished, elapsed_ms)
    assert started().judge(evidence) is verdict


@pytest.mark.parametrize("total", [0.0, math.nan])
def test_silence_is_not_confidence(total: float) -> None:
    tokens = 0 if total == 0.0 else 16
    evidence = Evidence(total, tokens, finished=True, elapsed_ms=10)
    assert started().judge(evidence) is Verdict.ESCALATE


def test_exactly_the_required_confidence_is_enough() -> None:
    even = AcceptanceRule(0.5, Calibration(slope=4.0, intercept=0.0))
    plan = Plan(
        "p",
        "d",
        "math",
        (Stage("a", even), Stage("b", None)),
        Caps(2, 0, 1000.0),
        StreamWindow(16, 500),
        (0, 0),
    )
    running = Cascade(plan, started_ms=0.0)
    running.next_attempt(0.0)
    assert running.judge(Evidence(0.0, 16, finished=True, elapsed_ms=0)) is Verdict.ACCEPT


def test_impossible_tokens_are_no_confidence_and_no_overflow() -> None:
    evidence = Evidence(-math.inf, 16, finished=True, elapsed_ms=10)
    assert started().judge(evidence) is Verdict.ESCALATE


def test_the_last_stage_is_accepted_at_once() -> None:
    running = started()
    running.next_attempt(100.0)
    running.next_attempt(100.0)
    assert running.judge(Evidence(0.0, 0, finished=False, elapsed_ms=0)) is Verdict.ACCEPT


def test_the_stage_cap_makes_an_earlier_stage_the_last() -> None:
    running = cascade(stages=1)
    attempt = running.next_attempt(100.0)
    assert isinstance(attempt, Attempt)
    assert attempt.is_last
    assert running.judge(UNSURE) is Verdict.ACCEPT


def test_a_failure_lets_the_next_stage_run_and_the_last_failure_ends_it() -> None:
    running = started()
    for _ in range(2):
        running.record_failure()
        assert isinstance(running.next_attempt(200.0), Attempt)
    running.record_failure()
    assert running.next_attempt(200.0) == Exhausted("stages")
    assert running.spent_micro_usd == 0


def test_a_failure_after_accepting_an_empty_answer_reopens_the_cascade() -> None:
    running = started()
    running.judge(SURE)
    running.record_failure()
    assert isinstance(running.next_attempt(200.0), Attempt)


def test_nothing_follows_an_accepted_answer() -> None:
    running = started()
    running.judge(SURE)
    with pytest.raises(RuntimeError, match="accepted"):
        running.next_attempt(200.0)


def test_an_escalation_past_the_deadline_is_exhausted() -> None:
    running = started()
    assert running.judge(UNSURE) is Verdict.ESCALATE
    running.spend(5)
    assert running.next_attempt(1100.0) == Exhausted("deadline")


def test_overspending_a_stage_stops_the_next_one() -> None:
    running = started()
    running.spend(21)
    assert running.next_attempt(200.0) == Exhausted("cost")


def test_an_unsettled_stage_counts_with_its_worst_case() -> None:
    running = started(cost=14)
    assert running.next_attempt(200.0) == Exhausted("cost")
    running.spend(4)
    assert isinstance(running.next_attempt(200.0), Attempt)


def test_misuse_is_an_error() -> None:
    running = cascade()
    with pytest.raises(RuntimeError, match="no stage"):
        running.judge(SURE)
    with pytest.raises(RuntimeError, match="no stage"):
        running.record_failure()
    with pytest.raises(ValueError, match="negative"):
        running.spend(-1)
