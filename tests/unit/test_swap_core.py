"""The scheduler's answers and refusals that no script shows: forecasts, misuse, measurements."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deployments.host_config import SchedulerSection
from deployments.swap.core import Scheduler, SchedulerConfig
from deployments.swap.effects import Grant, Refusal, Refuse
from deployments.swap.lanes import Lane, Request
from deployments.swap.measures import Measured

CONFIG = SchedulerConfig(in_flight_max=2, age_bound_ms=1_000, measure_ttl_ms=10_000)


def measured(swap_ms: float = 400.0, service_ms: float = 100.0) -> Scheduler:
    """Expert a is resident; one swap and one request have been measured; the time is 1,000 ms."""
    scheduler = Scheduler(CONFIG, ("a", "b", "c"))
    scheduler.arrive("first", "a", now_ms=0)
    scheduler.swap_done("a", 900 - service_ms, swap_ms)
    scheduler.finish("first", 900)
    scheduler.tick(1_000)
    return scheduler


def test_the_resident_with_room_costs_no_wait() -> None:
    assert measured().expected_wait_ms("a", 1_000) == 0.0


def test_an_idle_slot_costs_another_expert_one_swap_as_measured_for_its_siblings() -> None:
    assert measured().expected_wait_ms("b", 1_000) == pytest.approx(400)


def test_a_running_swap_costs_what_is_left_of_it() -> None:
    scheduler = measured()
    scheduler.arrive("r", "b", now_ms=1_000)
    assert scheduler.expected_wait_ms("b", 1_150) == pytest.approx(250)
    assert scheduler.expected_wait_ms("c", 1_150) > 250 + 400


def test_waiting_requests_cost_a_batch_of_service_each() -> None:
    scheduler = measured()
    for number in range(4):
        scheduler.arrive(f"r{number}", "a", now_ms=1_000)
    assert scheduler.expected_wait_ms("a", 1_000) == pytest.approx(3 * 100 / 2)
    assert scheduler.expected_wait_ms("a", 1_000, priority=1) == pytest.approx(1 * 100 / 2)


def test_an_expert_out_of_service_is_infinitely_far() -> None:
    scheduler = measured()
    scheduler.retire("b", "operator", 1_000)
    assert scheduler.expected_wait_ms("b", 1_000) == math.inf


def test_a_stale_measurement_refuses_nobody() -> None:
    """One slow swap must not lock out every short deadline for good."""
    scheduler = measured(swap_ms=5_000)
    refused = scheduler.arrive("early", "b", deadline_ms=1_000, now_ms=1_000)
    assert [type(effect) for effect in refused] == [Refuse]
    let_in = scheduler.arrive("late", "b", deadline_ms=1_000, now_ms=12_000)
    assert not any(isinstance(effect, Refuse) for effect in let_in)
    assert "late" in scheduler.queued_ids


def test_a_refusal_says_what_was_faced_and_what_was_allowed() -> None:
    [refusal] = measured().arrive("r", "b", deadline_ms=50, now_ms=1_000)
    assert isinstance(refusal, Refuse)
    assert (refusal.reason, refusal.wait_ms, refusal.limit_ms) == (Refusal.DEADLINE, 400.0, 50.0)


def test_misuse_is_an_error_not_a_decision() -> None:
    scheduler = Scheduler(CONFIG, ("a", "b"), "a")
    assert scheduler.arrive("r", "a", now_ms=0) == [Grant("r")]
    with pytest.raises(ValueError, match="here already"):
        scheduler.arrive("r", "b", now_ms=0)
    with pytest.raises(KeyError):
        scheduler.arrive("s", "z", now_ms=0)
    with pytest.raises(ValueError, match="no swap"):
        scheduler.swap_done("b", 0, 1)
    assert scheduler.first_token("r")
    with pytest.raises(ValueError, match="has sent"):
        scheduler.requeue("r", 0)
    with pytest.raises(KeyError):
        scheduler.finish("nobody", 0)
    with pytest.raises(KeyError):
        Scheduler(CONFIG, ("a",), "z")
    assert scheduler.in_flight_ids == {"r"}


def test_time_never_runs_backwards() -> None:
    scheduler = Scheduler(CONFIG, ("a",), "a")
    scheduler.arrive("r", "a", now_ms=500)
    scheduler.finish("r", 100)
    assert scheduler.snapshot().service_ms == 0.0


def test_the_snapshot_shows_what_a_registry_needs() -> None:
    scheduler = measured()
    scheduler.arrive("r1", "b", now_ms=1_000)
    scheduler.arrive("r2", "c", now_ms=1_000)
    scheduler.retire("a", "operator", 1_000)
    shown = scheduler.snapshot()
    assert (shown.phase, shown.resident, shown.target) == ("swapping", None, "b")
    assert (dict(shown.queued), shown.in_flight) == ({"b": 1, "c": 1}, 0)
    assert (dict(shown.swap_ms), shown.service_ms) == ({"a": 400.0}, 100.0)
    assert dict(shown.out_of_service) == {"a": "operator"}


def test_an_average_moves_by_its_weight_and_forgets_when_stale() -> None:
    average = Measured(weight=0.5, ttl_ms=100)
    assert average.fresh(0) is None
    average.observe(10, 0)
    average.observe(20, 50)
    assert average.fresh(60) == 15
    assert average.fresh(151) is None
    average.observe(40, 200)
    assert average.fresh(200) == 40


@given(
    st.lists(st.tuples(st.integers(-4, 4), st.floats(0, 1e6), st.booleans()), max_size=30),
    st.floats(1e6, 2e6),
)
def test_demand_in_two_sums_is_the_demand_counted_one_by_one(
    requests: list[tuple[int, float, bool]], now_ms: float
) -> None:
    lane = Lane("a", Measured(0.5, 1.0))
    stays: list[Request] = []
    for seq, (priority, arrived_ms, leaves) in enumerate(requests):
        request = Request(f"r{seq}", "a", priority, seq, arrived_ms, math.inf, math.inf)
        lane.push(request)
        if leaves:
            lane.remove(request)
        else:
            stays.append(request)
    expected = sum(2.0**r.priority * (1 + (now_ms - r.arrived_ms) / 1_000) for r in stays)
    assert lane.demand(now_ms, 1_000) == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert lane.head_ms == (stays[0].arrived_ms if stays else math.inf)


def test_a_turn_to_a_sleeping_engine_is_weighed_by_what_such_turns_took() -> None:
    """In place and between engines are measured apart, and every lane shows what holds now."""
    scheduler = Scheduler(
        CONFIG, ("a", "b", "w", "x"), "a", {"a": "1", "b": "1", "w": "2", "x": "2"}
    )
    for at, (expert, swap_ms) in enumerate([("b", 50), ("w", 3_000), ("x", 60), ("a", 2_000)]):
        now_ms = 4_000 * at
        scheduler.arrive(expert, expert, now_ms=now_ms)
        scheduler.swap_done(expert, now_ms + swap_ms, swap_ms)
        scheduler.finish(expert, now_ms + swap_ms)
    shown = scheduler.snapshot()
    assert dict(shown.swap_ms) == {"b": 50, "w": 3_000, "x": 3_000}
    assert scheduler.expected_wait_ms("x", 14_500) == 3_000
    assert scheduler.expected_wait_ms("b", 14_500) < 100


def test_a_host_s_settings_reach_its_scheduler_and_bad_ones_are_refused_with_the_file() -> None:
    section = SchedulerSection(age_bound_ms=900, drain_deadline_ms=700, queue_wait_ms_max=2_000)
    config = section.config()
    assert {name: getattr(config, name) for name in SchedulerSection.model_fields} == (
        section.model_dump()
    )
    assert SchedulerSection().config() == SchedulerConfig(), "the defaults are one and the same"
    with pytest.raises(ValidationError, match="drain_deadline_ms"):
        SchedulerSection(drain_deadline_ms=0)


def test_nobody_waits_longer_than_the_queue_s_bound_and_everybody_is_told() -> None:
    """Two aged experts and one slot: the second cannot be served within the bound as worded."""
    config = SchedulerConfig(
        in_flight_max=1, age_bound_ms=100, min_residency_ms=0, queue_wait_ms_max=100 + 50 + 10
    )
    scheduler = Scheduler(config, ("a", "b", "c"), "a")
    assert scheduler.arrive("a1", "a", now_ms=0) == [Grant("a1")]
    scheduler.arrive("b1", "b", now_ms=0)
    scheduler.arrive("c1", "c", now_ms=0)
    scheduler.finish("a1", 120)
    effects = scheduler.swap_done("b", 130, 10)
    assert Grant("b1") in effects
    [refusal] = [e for e in scheduler.tick(160) if isinstance(e, Refuse)]
    assert (refusal.request_id, refusal.reason) == ("c1", Refusal.DEADLINE)
    assert refusal.wait_ms >= refusal.limit_ms == 160
