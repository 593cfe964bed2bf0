"""The load benchmark: its baselines are what they say they are, and so is what it reads off."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from bench._fcfs_lru import FcfsLru
from bench._load_sweep import (
    Outcome,
    Terms,
    arrivals,
    main_load,
    sustained_rate,
    sustained_ratio,
)
from deployments.swap.config import SchedulerConfig
from deployments.swap.effects import BeginSwap, Effect, Grant, Refuse

CONFIG = SchedulerConfig(in_flight_max=2, queue_max=4, queue_wait_ms_max=120_000)


def done(effects: list[Effect]) -> list[str]:
    """What was granted, swapped and refused, in order."""
    names = []
    for effect in effects:
        match effect:
            case Grant(name):
                names.append(f"grant {name}")
            case BeginSwap(expert):
                names.append(f"swap {expert}")
            case Refuse(name):
                names.append(f"refuse {name}")
    return names


def test_nobody_passes_the_head_and_neighbours_run_together() -> None:
    scheduler = FcfsLru(CONFIG, "a")
    assert done(scheduler.arrive("a1", "a", now_ms=0)) == ["grant a1"]
    assert done(scheduler.arrive("b1", "b", now_ms=1)) == []
    assert done(scheduler.arrive("b2", "b", now_ms=2)) == []
    assert done(scheduler.arrive("a2", "a", now_ms=3)) == [], "resident, with room, and yet behind"
    assert done(scheduler.finish("a1", 10)) == ["swap b"]
    assert done(scheduler.swap_done("b", 20, 10)) == ["grant b1", "grant b2"]
    assert done(scheduler.finish("b1", 30)) == [], "the slot drains before it turns"
    assert done(scheduler.finish("b2", 31)) == ["swap a"]
    assert done(scheduler.swap_done("a", 40, 9)) == ["grant a2"]


def test_its_bounds_are_those_of_the_scheduler_it_is_held_against() -> None:
    scheduler = FcfsLru(CONFIG, "a")
    for number in range(2):
        scheduler.arrive(f"a{number}", "a", now_ms=0)
    for number in range(4):
        scheduler.arrive(f"b{number}", "b", now_ms=0, deadline_ms=100)
    assert done(scheduler.arrive("late", "b", now_ms=1)) == ["refuse late"]
    assert done(scheduler.tick(100)) == [f"refuse b{number}" for number in range(4)]
    assert scheduler.snapshot().queued == {}


def test_in_batches_the_resident_goes_first_and_nobody_waits_for_a_later_batch() -> None:
    scheduler = FcfsLru(CONFIG, "a", batch_max=2)
    assert done(scheduler.arrive("a1", "a", now_ms=0)) == ["grant a1"]
    assert done(scheduler.arrive("b1", "b", now_ms=1)) == []
    assert done(scheduler.arrive("a2", "a", now_ms=2)) == ["grant a2"], "of b1's batch"
    assert done(scheduler.arrive("a3", "a", now_ms=3)) == [], "of the next batch"
    assert done(scheduler.finish("a1", 10)) == []
    assert done(scheduler.finish("a2", 11)) == ["swap b"]
    assert done(scheduler.swap_done("b", 20, 9)) == ["grant b1"]
    assert done(scheduler.finish("b1", 30)) == ["swap a"]
    assert done(scheduler.swap_done("a", 40, 9)) == ["grant a3"]


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40),
    st.integers(1, 5),
)
def test_no_request_is_passed_by_more_than_its_batch(
    events: list[tuple[str, bool]], batch_max: int
) -> None:
    """And none is lost: once nothing more comes, all have been served."""
    scheduler = FcfsLru(replace(CONFIG, queue_max=99), "a", batch_max=batch_max)
    granted: list[int] = []
    running: list[str] = []
    swapping: list[str] = []

    def take(effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Grant):
                granted.append(int(effect.request_id))
                running.append(effect.request_id)
            elif isinstance(effect, BeginSwap):
                assert not running
                assert not swapping
                swapping.append(effect.expert)

    def advance(at_ms: int) -> None:
        if swapping:
            take(scheduler.swap_done(swapping.pop(), at_ms, 1))
        elif running:
            take(scheduler.finish(running.pop(0), at_ms))

    for number, (expert, step) in enumerate(events):
        take(scheduler.arrive(str(number), expert, now_ms=number))
        if step:
            advance(number)
    while running or swapping:
        advance(len(events))
    assert sorted(granted) == list(range(len(events)))
    for at, number in enumerate(granted):
        assert sum(other > number for other in granted[:at]) < batch_max


def test_the_load_is_skewed_bursty_and_exactly_as_large_as_it_is_said_to_be() -> None:
    experts = list("abcde")
    load = arrivals(experts, 40.0, 60.0, seed=3)
    assert load == arrivals(experts, 40.0, 60.0, seed=3)
    assert load != arrivals(experts, 40.0, 60.0, seed=4)
    assert abs(len(load) - 40 * 60) <= len(experts)
    assert all(0 <= arrival.at_s < 60 for arrival in load)
    counts = [sum(arrival.expert == expert for arrival in load) for expert in experts]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 4 * counts[-1]
    busiest = [arrival.at_s for arrival in load if arrival.expert == "a"]
    gaps = [b - a for a, b in itertools.pairwise(busiest)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance > 4 * mean**2, "far burstier than a Poisson process"


def point(rate: float, **goodput: float) -> dict[str, Any]:
    return {"requests_per_s": rate, **{name: {"goodput": g} for name, g in goodput.items()}}


SWEEP = [
    point(10, ours=1.0, base=0.95),
    point(20, ours=0.96, base=0.45),
    point(30, ours=0.92, base=0.1),
    point(40, ours=0.82, base=0.3),
    point(50, ours=0.91, base=0.0),
]


def test_the_main_load_is_the_last_before_ours_first_falls_short() -> None:
    assert main_load(SWEEP, "ours")["requests_per_s"] == 30
    assert main_load(SWEEP[:2], "ours")["requests_per_s"] == 20
    assert main_load(SWEEP[3:], "ours")["requests_per_s"] == 40, "never attained: the lowest"


def test_the_sustained_rate_is_read_off_where_nine_tenths_are_crossed() -> None:
    assert sustained_rate(SWEEP, "ours") == {"requests_per_s": 32.0, "is": "interpolated"}
    assert sustained_rate(SWEEP, "base") == {"requests_per_s": 11.0, "is": "interpolated"}
    assert sustained_rate(SWEEP[:2], "ours") == {"requests_per_s": 20, "is": "at_least"}
    assert sustained_rate(SWEEP[1:], "base") == {"requests_per_s": 20, "is": "at_most"}


def test_a_ratio_with_a_bound_in_it_says_so() -> None:
    def rate(requests_per_s: float, kind: str) -> dict[str, Any]:
        return {"requests_per_s": requests_per_s, "is": kind}

    def ratio(mine: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, str]:
        result = sustained_ratio(mine, theirs)
        return result["ratio"], result["is"]

    known = rate(10.0, "interpolated")
    assert ratio(rate(20.0, "interpolated"), known) == (2.0, "interpolated")
    assert ratio(rate(20.0, "at_least"), known) == (2.0, "at_least")
    assert ratio(known, rate(20.0, "at_least")) == (0.5, "at_most")
    assert ratio(known, rate(5.0, "at_most")) == (2.0, "at_least")
    assert ratio(rate(20.0, "at_least"), rate(20.0, "at_least")) == (1.0, "unknown")


def test_who_was_refused_counts_as_having_waited_the_whole_patience() -> None:
    outcome = Outcome(waits_ms=[100.0] * 8 + [1_500.0], refused={"QueueFull": 1}, swaps=3)
    summary = outcome.summary(Terms(objective_ms=1_000.0))
    assert (summary["requests"], summary["within_objective"]) == (10, 8)
    assert summary["wait_ms"]["p99"] == 5_000.0
