"""How long a request may wait where no number says so: age bound, drain deadline and one swap."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deployments.swap.config import SchedulerConfig
from deployments.swap.core import Scheduler
from deployments.swap.effects import AbortInFlight, BeginSwap, Effect, Grant, Refusal, Refuse

AGE, DRAIN = 100, 50
CONFIG = SchedulerConfig(
    in_flight_max=2, age_bound_ms=AGE, drain_deadline_ms=DRAIN, min_residency_ms=0
)


def refused(effects: list[Effect]) -> list[str]:
    return [effect.request_id for effect in effects if isinstance(effect, Refuse)]


def granted(effects: list[Effect]) -> list[str]:
    return [effect.request_id for effect in effects if isinstance(effect, Grant)]


def busy(sent: bool, config: SchedulerConfig = CONFIG) -> Scheduler:
    """Expert a is resident and runs one request since 0 ms; b's has waited as long."""
    scheduler = Scheduler(config, ("a", "b", "c"), "a")
    scheduler.arrive("a1", "a", now_ms=0)
    scheduler.arrive("b1", "b", now_ms=0)
    if sent:
        scheduler.first_token("a1")
    return scheduler


def test_a_cold_expert_s_first_swap_is_waited_for_however_long_it_reads_the_disk() -> None:
    scheduler = Scheduler(CONFIG, ("a", "b"))
    assert BeginSwap("a") in scheduler.arrive("a1", "a", now_ms=0)
    scheduler.arrive("b1", "b", now_ms=10)
    assert refused(scheduler.tick(10 + AGE + DRAIN)) == ["b1"], "somebody else's swap is no excuse"
    assert refused(scheduler.tick(20_000)) == []
    assert granted(scheduler.swap_done("a", 40_000, 40_000)) == ["a1"]


def test_a_swap_that_does_not_end_is_not_waited_for_for_ever() -> None:
    """Its actuator may hang where no time limit reaches it: in a device call, in a read."""
    scheduler = Scheduler(CONFIG, ("a", "b"))
    scheduler.arrive("a1", "a", now_ms=0)
    limit_ms = CONFIG.swap_timeout_ms + CONFIG.close_grace_ms
    assert refused(scheduler.tick(limit_ms - 1)) == []
    assert refused(scheduler.tick(limit_ms)) == ["a1"]


def test_a_deadline_of_its_own_ends_a_wait_in_the_middle_of_the_swap() -> None:
    scheduler = Scheduler(CONFIG, ("a", "b"))
    scheduler.arrive("short", "a", now_ms=0, deadline_ms=30)
    scheduler.arrive("long", "a", now_ms=0, deadline_ms=1_000)
    assert refused(scheduler.tick(30)) == ["short"]
    assert refused(scheduler.tick(999)) == []
    assert refused(scheduler.tick(1_000)) == ["long"]


def test_whom_the_swap_brings_no_room_for_is_refused_when_it_ends() -> None:
    scheduler = Scheduler(CONFIG, ("a", "b"))
    for number in range(3):
        scheduler.arrive(f"a{number}", "a", now_ms=0)
    scheduler.arrive("late", "a", now_ms=900)
    effects = scheduler.swap_done("a", 1_000, 1_000)
    assert (granted(effects), refused(effects)) == (["a0", "a1"], ["a2"])
    assert scheduler.queued_ids == {"late"}, "its time is not over"


def test_who_was_kept_on_from_the_drain_is_refused_at_the_swap_s_end_too() -> None:
    config = replace(CONFIG, in_flight_max=1)
    scheduler = busy(sent=False, config=config)
    scheduler.arrive("b2", "b", now_ms=1)
    scheduler.tick(AGE + 2)
    scheduler.tick(AGE + DRAIN + 2)  # aborts a1; both wait on while it stops
    scheduler.requeue("a1", AGE + DRAIN + 20)
    effects = scheduler.swap_done("b", 300, 120)
    assert (granted(effects), refused(effects)) == (["b1"], ["b2"])


def test_a_drain_that_began_in_time_is_waited_for_though_timers_and_aborts_take_a_moment() -> None:
    scheduler = busy(sent=False)
    scheduler.tick(AGE + 12)  # the timer was late, so the drain ends later than the bound
    assert scheduler.phase == "draining"
    assert refused(scheduler.tick(AGE + DRAIN + 1)) == []
    assert AbortInFlight(("a1",)) in scheduler.tick(AGE + DRAIN + 13)
    assert BeginSwap("b") in scheduler.requeue("a1", AGE + DRAIN + 40)
    assert "b1" in granted(scheduler.swap_done("b", 1_000, 800))


def test_an_answer_that_outlasts_the_drain_ends_the_wait_at_the_bound_and_not_the_turn() -> None:
    """The caller is told when to come back; the drain goes on, and whoever comes then is served."""
    scheduler = busy(sent=True)
    scheduler.tick(AGE)
    [refusal] = [e for e in scheduler.tick(AGE + DRAIN) if isinstance(e, Refuse)]
    assert (refusal.request_id, refusal.reason) == ("b1", Refusal.DEADLINE)
    scheduler.arrive("a2", "a", now_ms=200)
    assert (scheduler.phase, scheduler.in_flight_ids) == ("draining", {"a1"})
    assert refused(scheduler.arrive("b2", "b", now_ms=280)) == []
    effects = scheduler.finish("a1", 300)
    assert BeginSwap("b") in effects
    assert granted(scheduler.swap_done("b", 310, 10)) == ["b2"]


def test_a_drain_that_nobody_comes_back_to_ends_where_it_was() -> None:
    scheduler = busy(sent=True)
    scheduler.tick(AGE)
    scheduler.tick(AGE + DRAIN)
    scheduler.arrive("a2", "a", now_ms=200)
    assert granted(scheduler.finish("a1", 300)) == ["a2"]


def test_answers_longer_than_the_drain_deadline_refuse_nobody_beforehand() -> None:
    """By their mean nobody could be served in time. If that refused everybody at once, none would
    ever age, and the slot would never turn."""
    scheduler = Scheduler(CONFIG, ("a", "b"), "a")
    scheduler.arrive("a0", "a", now_ms=0)
    scheduler.finish("a0", 10_000)
    scheduler.arrive("a1", "a", now_ms=10_000)
    assert refused(scheduler.arrive("b1", "b", now_ms=10_000)) == []


def test_what_is_foreseen_to_wait_longer_is_refused_at_once_and_told_when_it_would_fit() -> None:
    scheduler = Scheduler(CONFIG, ("a", "b", "c"))
    scheduler.arrive("a1", "a", now_ms=0)
    scheduler.swap_done("a", 400, 400)
    scheduler.arrive("b1", "b", now_ms=400)  # b is swapped in when a1 has ended
    scheduler.finish("a1", 450)
    [refusal] = [e for e in scheduler.arrive("c1", "c", now_ms=451) if isinstance(e, Refuse)]
    assert refusal.limit_ms == pytest.approx(AGE + DRAIN + 400), "with its own swap, as measured"
    assert refusal.wait_ms > refusal.limit_ms
    assert refusal.retry_ms == pytest.approx(refusal.wait_ms - refusal.limit_ms)


def test_what_a_drain_takes_back_waits_for_its_turn_anew() -> None:
    """It had its turn and lost it: else a long prompt would be started and refused for ever."""
    scheduler = busy(sent=False)
    scheduler.tick(AGE)
    scheduler.tick(AGE + DRAIN)
    scheduler.requeue("a1", AGE + DRAIN)
    scheduler.swap_done("b", 160, 10)
    scheduler.first_token("b1")
    scheduler.tick(180)  # the end of b's minimum residency
    assert refused(scheduler.tick(AGE + DRAIN + 140)) == []
    assert "a1" in scheduler.queued_ids
    assert refused(scheduler.tick(2 * (AGE + DRAIN) + 1)) == ["a1"], "b1 has not ended"
