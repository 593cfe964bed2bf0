"""GreedyDual-Size with Frequency: who leaves the pool."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.pool_eviction import EvictionScores

SIZE = 100


def scores(*experts: tuple[str, float]) -> EvictionScores:
    made = EvictionScores()
    for expert, cost_s in experts:
        made.loaded(expert, cost_s=cost_s, size_bytes=SIZE)
    return made


def test_equal_costs_and_use_leave_the_one_unused_for_longest() -> None:
    made = scores(("a", 1.0), ("b", 1.0), ("c", 1.0))
    assert made.victim("abc") == "a"
    made.used("a")
    made.used("b")
    made.used("c")
    made.used("b")
    made.used("c")
    made.used("a")
    assert made.victim("abc") == "b"


def test_the_one_that_is_dear_to_bring_back_stays() -> None:
    made = scores(("dear", 60.0), ("cheap", 1.0))
    made.used("cheap")
    assert made.victim(["dear", "cheap"]) == "cheap"


def test_past_popularity_ages_out() -> None:
    made = scores(("old", 1.0))
    for _ in range(5):
        made.used("old")
    for number in range(20):
        name = f"new{number}"
        made.loaded(name, cost_s=1.0, size_bytes=SIZE)
        victim = made.victim(["old", name])
        made.evicted(victim)
        if victim == "old":
            return
    pytest.fail("an expert that nobody asks for any more was kept for ever")


def test_only_candidates_are_chosen() -> None:
    made = scores(("a", 1.0), ("b", 9.0))
    assert made.victim(["b"]) == "b"
    with pytest.raises(ValueError, match="empty"):
        made.victim([])


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0.1, 100)), min_size=1))
def test_the_victim_is_always_a_candidate_of_least_score(steps: list[tuple[str, float]]) -> None:
    made = EvictionScores()
    pooled: set[str] = set()
    for expert, cost_s in steps:
        if expert in pooled:
            made.used(expert)
            continue
        if len(pooled) == 3:
            victim = made.victim(pooled)
            assert victim in pooled
            made.evicted(victim)
            pooled.remove(victim)
        made.loaded(expert, cost_s=cost_s, size_bytes=SIZE)
        pooled.add(expert)
        assert made.victim(pooled) in pooled
