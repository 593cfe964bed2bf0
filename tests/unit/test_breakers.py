"""Circuit breakers and retries as decisions: time and randomness are arguments."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import (
    CoeError,
    ExpertFailed,
    HostLost,
    HostUnavailable,
    QueueFull,
    SwapFailed,
    UpstreamTimeout,
)
from gateway.breakers import Breaker, BreakerRules, BreakerState, Calls, Probe, faults
from gateway.retries import RetryBudget, RetryRules, is_transient
from gateway.state.breakers import BreakerBoard, Passage

RULES = BreakerRules(failures_in_a_row=3, calls_min=10, window_ms=1_000, open_ms=100)
E, H = "expert:e", "host:h"


def tripped(now_ms: int = 0) -> Breaker:
    breaker = Breaker()
    breaker.record(RULES, Calls(0, RULES.failures_in_a_row, RULES.failures_in_a_row), now_ms)
    return breaker


def test_failures_in_a_row_open_it_and_a_success_between_does_not() -> None:
    breaker = Breaker()
    for outcome in (Calls(0, 2, 2), Calls(1, 0, 0), Calls(0, 2, 2)):
        breaker.record(RULES, outcome, 0)
    assert breaker.state(0) is BreakerState.CLOSED
    breaker.record(RULES, Calls(0, 1, 1), 0)
    assert breaker.state(0) is BreakerState.OPEN


def test_a_large_share_of_failures_opens_it_only_within_the_window() -> None:
    def after(gap_ms: int) -> BreakerState:
        breaker = Breaker()
        for number in range(10):
            breaker.record(RULES, (Calls(0, 1, 1), Calls(1, 0, 0))[number % 2], number * gap_ms)
        breaker.record(RULES, Calls(0, 1, 1), 10 * gap_ms)
        return breaker.state(10 * gap_ms)

    assert after(20) is BreakerState.OPEN
    assert after(300) is BreakerState.CLOSED


def test_half_open_lets_one_probe_pass_and_doubles_the_back_off_when_it_fails() -> None:
    breaker = tripped()
    assert not breaker.claim(RULES, 99)
    assert breaker.claim(RULES, 100)
    assert not breaker.claim(RULES, 100), "one at a time"
    breaker.probed(RULES, Probe.FAILED, 110)
    assert breaker.wait_ms(110) == 200
    assert breaker.claim(RULES, 310)
    breaker.probed(RULES, Probe.OK, 320)
    assert breaker.state(320) is BreakerState.CLOSED
    breaker.record(RULES, Calls(0, 3, 3), 330)
    assert breaker.wait_ms(330) == 100, "the next back-off starts small again"


def test_a_probe_nobody_hears_of_again_gives_its_place_up() -> None:
    breaker = tripped()
    assert breaker.claim(RULES, 200)
    assert not breaker.claim(RULES, 200 + RULES.probe_lease_ms - 1)
    assert breaker.claim(RULES, 200 + RULES.probe_lease_ms)


@pytest.mark.parametrize(
    ("error", "to_blame"),
    [
        (ExpertFailed("e", 400, "no"), ()),
        (ExpertFailed("e", 413, "no"), ()),
        (ExpertFailed("e", 429, "no"), ()),
        (ExpertFailed("e", 500, "oh"), (E,)),
        (HostLost("e", "h"), (H,)),
        (UpstreamTimeout("e", "connect", 1.0), (H,)),
        (UpstreamTimeout("e", "first token", 1.0), (E, H)),
        (UpstreamTimeout("e", "between tokens", 1.0), (E, H)),
        (QueueFull("e", 3, 1.0), ()),
        (HostUnavailable("e"), ()),
        (SwapFailed("e", "x"), ()),
    ],
)
def test_only_what_speaks_about_the_upstream_is_held_against_it(
    error: CoeError, to_blame: tuple[str, ...]
) -> None:
    assert faults(error, "e", "h", short_of_time=False) == to_blame
    remote = faults(error, "e", "", short_of_time=False)
    assert remote == ((E,) if to_blame else ())


def test_a_deadline_of_the_caller_s_cannot_close_an_expert_to_others() -> None:
    timeout = UpstreamTimeout("e", "total", 1.0)
    assert faults(timeout, "e", "h", short_of_time=True) == ()


async def test_a_board_without_a_store_keeps_its_own_breakers() -> None:
    now = [0.0]
    board = BreakerBoard(rules=RULES, now_ms=lambda: now[0])
    for _ in range(3):
        leave = await board.enter((E, H))
        assert isinstance(leave, Passage)
        leave.failed((H,))
    assert await board.enter((E, H)) == H
    assert isinstance(await board.enter((E,)), Passage)
    now[0] = 101.0
    probe = await board.enter((E, H))
    assert isinstance(probe, Passage)
    assert await board.enter((E, H)) == H
    probe.answered()
    assert isinstance(await board.enter((E, H)), Passage)


# --- retries -------------------------------------------------------------------------------------


def test_the_pause_has_full_jitter_under_a_growing_bound() -> None:
    rules = RetryRules(per_stage=5, base_ms=100, cap_ms=300)
    pauses = [rules.pause_ms(retry, 0.5, 10_000) for retry in range(6)]
    assert pauses == [50, 100, 150, 150, 150, None]
    assert rules.pause_ms(0, 0.0, 10_000) == 0
    assert rules.pause_ms(0, 0.9, 100) is None, "not at the cost of the answer's own time"


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(0, 50)), max_size=300))
def test_retries_stay_a_tenth_of_the_requests(script: list[tuple[bool, float]]) -> None:
    rules = RetryRules(budget_burst=3, budget_per_s=0.1)
    budget, now_ms, requests, retries = RetryBudget(rules, 0.0), 0.0, 0, 0
    for is_retry, wait_ms in script:
        now_ms += wait_ms
        if is_retry:
            retries += budget.take(now_ms)
        else:
            requests += 1
            budget.note_request(now_ms)
    earned = 3 + 0.1 * requests + now_ms / 1000 * 0.1
    assert retries <= earned + 1e-6


def test_a_budget_that_is_spent_comes_back_with_time_and_traffic() -> None:
    budget = RetryBudget(RetryRules(budget_burst=1), 0.0)
    assert budget.take(0.0)
    assert not budget.take(0.0)
    for _ in range(10):
        budget.note_request(1.0)
    assert budget.take(1.0)
    assert budget.take(10_002.0), "a tenth of a retry each second"


def test_what_may_work_a_moment_later() -> None:
    assert is_transient(ExpertFailed("e", 503, ""))
    assert is_transient(HostLost("e", ""))
    assert not is_transient(ExpertFailed("e", 400, ""))
    assert not is_transient(UpstreamTimeout("e", "total", 1.0)), "the work was under way"
