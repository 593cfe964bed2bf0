"""Several hosts, a gateway and placement among faults, many seeds; and planted mistakes.

``COE_SIM_SEEDS`` and ``COE_SIM_SEED`` as for the scheduler; a quarter as many seeds run.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any

import pytest

from tests.sim.fleet import Fleet, Gateway, Host, Violation
from tests.sim.fleet_planted import PLANTED

SEEDS = int(os.environ.get("COE_SIM_SEEDS", "200")) // 4
ONE_SEED = os.environ.get("COE_SIM_SEED")
BATCH = 25


def _seeds() -> list[range]:
    if ONE_SEED is not None:
        return [range(int(ONE_SEED), int(ONE_SEED) + 1)]
    return [range(low, min(low + BATCH, SEEDS)) for low in range(0, SEEDS, BATCH)]


@pytest.mark.parametrize("seeds", _seeds(), ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}")
def test_no_rule_of_the_fleet_is_broken(seeds: range) -> None:
    for seed in seeds:
        Fleet(seed).run()


def test_the_same_seed_gives_the_same_fleet() -> None:
    assert Fleet(3).run() == Fleet(3).run()


def test_the_seeds_reach_every_fault() -> None:
    seen: Counter[str] = Counter()
    for seed in range(25):
        fleet = Fleet(seed)
        fleet.run()
        seen.update(fleet.counts)
    faults = ("swap corrupt", "swap failed", "swap out of memory", "deaths", "cut off")
    stories = (
        "served",
        "left",
        "cut",
        "moved",
        "move pool",
        "move evict",
        "refused out_of_service",
    )
    assert all(seen[story] > 0 for story in (*faults, *stories)), seen


@pytest.mark.parametrize(
    ("planted", "rule"), PLANTED.items(), ids=[planted.__name__ for planted in PLANTED]
)
def test_a_mistake_in_the_fleet_is_caught_for_what_it_is(planted: type[Any], rule: str) -> None:
    others: Counter[str] = Counter()
    gateway = planted if issubclass(planted, Gateway) else Gateway
    host = planted if issubclass(planted, Host) else Host
    for seed in range(60):
        try:
            Fleet(seed, gateway, host).run()
        except Violation as violation:
            if re.search(rule, str(violation)):
                return
            others[str(violation).split(": ", 1)[1]] += 1
    pytest.fail(f"60 seeds let {planted.__name__} pass; they broke {others or 'no rule'}")
