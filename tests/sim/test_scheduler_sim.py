"""The scheduler in a hostile world, many seeds; and the same world against planted mistakes.

``COE_SIM_SEEDS=10000`` runs more seeds, ``COE_SIM_SEED=17`` one.
"""

from __future__ import annotations

import os
import re
from collections import Counter

import pytest

from deployments.swap.core import Scheduler
from tests.sim.planted import PLANTED
from tests.sim.world import Violation, World

SEEDS = int(os.environ.get("COE_SIM_SEEDS", "200"))
ONE_SEED = os.environ.get("COE_SIM_SEED")
BATCH = 50


def _seeds() -> list[range]:
    if ONE_SEED is not None:
        return [range(int(ONE_SEED), int(ONE_SEED) + 1)]
    return [range(low, min(low + BATCH, SEEDS)) for low in range(0, SEEDS, BATCH)]


@pytest.mark.parametrize("seeds", _seeds(), ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_no_rule_is_broken(seeds: range) -> None:
    for seed in seeds:
        World(seed).run()


@pytest.mark.parametrize("seed", [0, 7, 23])
def test_the_same_seed_gives_the_same_trace(seed: int) -> None:
    assert World(seed).run() == World(seed).run()


def test_the_seeds_reach_every_story() -> None:
    """Coverage of the world itself: a fault that never happens proves nothing."""
    seen: Counter[str] = Counter()
    for seed in range(40):
        world = World(seed)
        world.run()
        seen.update(world.counts)
    stories = ("SERVED", "LEFT", "LOST", "swaps", "swaps failed", "aborts", "turns of engines")
    refusals = ("refused queue_full", "refused deadline", "refused out_of_service")
    kept = (
        "started within the bound as worded",
        "waited its own swap out",
        "refused at the bound",
    )
    assert all(seen[story] > 0 for story in (*stories, *refusals, *kept)), seen


@pytest.mark.parametrize(
    ("planted", "rule"), PLANTED.items(), ids=[planted.__name__ for planted in PLANTED]
)
def test_a_planted_mistake_is_caught_for_what_it_is(planted: type[Scheduler], rule: str) -> None:
    others: Counter[str] = Counter()
    for seed in range(100):
        try:
            World(seed, planted).run()
        except Violation as violation:
            if re.search(rule, str(violation)):
                return
            others[str(violation).splitlines()[0]] += 1
    pytest.fail(f"100 seeds let {planted.__name__} pass; they broke {others or 'no rule'}")
