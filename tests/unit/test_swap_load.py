"""The baseline of the load benchmark is what it says it is: strictly first come, first served."""

from __future__ import annotations

import itertools
import random

from bench._fcfs_lru import FcfsLru
from bench.swap_load import Outcome, Terms, _arrivals
from deployments.swap.config import SchedulerConfig
from deployments.swap.effects import BeginSwap, Effect, Grant, Refuse

CONFIG = SchedulerConfig(in_flight_max=2, queue_max=4)


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


def test_the_load_is_skewed_bursty_and_the_same_for_both() -> None:
    experts = list("abcde")
    load = _arrivals(experts, 40.0, 60.0, random.Random(3))
    assert load == _arrivals(experts, 40.0, 60.0, random.Random(3))
    assert 0.5 < len(load) / (40 * 60) < 1.7
    assert {arrival.expert for arrival in load} == set(experts)
    gaps = [b.at_s - a.at_s for a, b in itertools.pairwise(load)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance > 1.5 * mean**2, "burstier than a Poisson process"


def test_who_was_refused_counts_as_having_waited_the_whole_patience() -> None:
    outcome = Outcome(waits_ms=[100.0] * 8 + [1_500.0], refused={"QueueFull": 1}, swaps=3)
    summary = outcome.summary(Terms(objective_ms=1_000.0))
    assert (summary["requests"], summary["within_objective"]) == (10, 8)
    assert summary["wait_ms"]["p99"] == 6_000.0
