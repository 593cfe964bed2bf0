"""The placement planner against a cluster: safe at every second, at rest when demand stays."""

from __future__ import annotations

import random

import pytest

from deployments.placement import MoveKind
from tests.sim.placement_cluster import Cluster, FakeHost

NAMES = tuple(f"e{n}" for n in range(8))


def cluster(demand: dict[str, float], places: tuple[int, ...], held: tuple[str, ...]) -> Cluster:
    world = Cluster(demand, random.Random(1))
    for n, size in enumerate(places):
        world.add(FakeHost(f"h{n}", size, 10, tuple(demand), pooled=set(held[n].split())))
    return world


def test_a_hot_expert_gets_a_second_copy_and_then_all_is_at_rest() -> None:
    world = cluster({"e0": 0.9, "e1": 0.05, "e2": 0.05}, (3, 3), ("e0 e1", "e2"))
    world.run(120)
    assert world.copies("e0") == 2
    calm_ms = world.now_ms
    world.run(300)
    assert world.moves_since(calm_ms) == []


def test_idle_experts_do_not_keep_a_hot_one_from_its_second_copy() -> None:
    idle = {"e1": 0.0, "e2": 0.0, "e3": 0.0}
    world = cluster({"e0": 0.9, **idle}, (2, 2), ("e0 e1", "e2 e3"))
    world.run(300)
    assert world.copies("e0") == 2
    assert sum(world.copies(e) for e in idle) == 2, "they keep the room that is left"
    assert len(world.moves) == 2


def test_when_demand_shifts_the_copies_follow() -> None:
    demand = {"e0": 0.9, "e1": 0.05, "e2": 0.05, "e3": 0.05}
    world = cluster(demand, (2, 2, 2), ("e0 e1", "e2", "e3"))
    world.run(120)
    assert world.copies("e0") == 3
    world.demand = demand | {"e0": 0.05, "e2": 0.9}
    world.run(300)
    assert world.copies("e2") > world.copies("e0")
    first, *_, last = [move.kind for move in world.moves_since(120_000)]
    assert (first, last) == (MoveKind.EVICT, MoveKind.POOL), "room had to be made first"
    assert world.moves_since(240_000) == []


def test_what_a_dead_host_held_is_pooled_elsewhere_before_anybody_asks_for_it() -> None:
    world = cluster(dict.fromkeys(NAMES[:4], 0.2), (2, 2, 2), ("e0 e1", "e2", "e3"))
    world.run(60)
    world.kill("h2")
    world.demand["e3"] = 0.0
    world.run(20)
    assert world.copies("e3") >= 1
    assert world.read_on_demand == []


def test_a_full_cluster_that_holds_all_it_may_is_never_computed() -> None:
    world = Cluster({"e0": 0.9, "e1": 0.1}, random.Random(1))
    world.add(FakeHost("h0", 2, 10, ("e0", "e1"), pooled={"e0", "e1"}))
    world.run(60)
    assert world.planner.question(world.now_ms + 60_000) is None
    assert world.moves == []


@pytest.mark.parametrize("seed", range(24))
def test_whatever_happens_the_rules_hold_and_it_comes_to_rest(seed: int) -> None:
    rng = random.Random(seed)
    names = NAMES[: rng.randint(2, 8)]
    world = Cluster({e: rng.choice((0.0, 0.02, 0.1, 0.8)) for e in names}, rng)
    lives = 0
    for n in range(rng.randint(1, 4)):
        may = names if rng.random() < 0.5 else tuple(rng.sample(names, rng.randint(1, len(names))))
        places = rng.randint(1, len(names))
        held = rng.sample(may, min(places, rng.randint(0, len(may))))
        # Entries need not be of one size everywhere: number formats differ between devices.
        world.add(FakeHost(f"h{n}", places, rng.choice((10, 20)), may, pooled=set(held)))
    for _ in range(6):
        world.run(rng.randint(5, 60))
        match rng.choice(("shift", "die", "silence", "join")):
            case "shift":
                world.demand = {e: rng.choice((0.0, 0.02, 0.1, 0.8)) for e in names}
            case "die" if len(world.hosts) > 1:
                world.kill(rng.choice(sorted(world.hosts)))
            case "silence":
                host = world.hosts[rng.choice(sorted(world.hosts))]
                host.silent = not host.silent
            case _:
                lives += 1
                world.add(FakeHost(f"new{lives}", rng.randint(1, len(names)), 10, names))
    for host in world.hosts.values():
        host.silent = False
    world.run(400)
    calm_ms = world.now_ms
    world.run(120)
    if not any(at_ms > calm_ms - 60_000 for at_ms in world.read_on_demand):
        assert world.moves_since(calm_ms) == []
    room = sum(host.places for host in world.hosts.values())
    if all(set(host.experts) == set(names) for host in world.hosts.values()) and room >= len(names):
        assert all(world.copies(expert) for expert, load in world.demand.items() if load)
