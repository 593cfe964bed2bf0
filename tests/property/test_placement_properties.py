"""Placing experts on hosts: rules that hold for any demand, any memory and on every way there."""

from __future__ import annotations

import itertools
from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deployments.placement import (
    ExpertNeed,
    HostRoom,
    Move,
    MoveKind,
    PlacementConfig,
    apply_move,
    cost,
    next_move,
    settle,
    unplaced,
)

CONFIG = PlacementConfig(gain_min=0.05)
YIELDING = PlacementConfig(gain_min=0.05, idle_yields=True)
SIZES = {"llama": 10, "qwen": 14}
NOBODY = frozenset[str]()


@st.composite
def needs(draw: st.DrawFn) -> list[ExpertNeed]:
    count = draw(st.integers(1, 10))
    groups = draw(st.lists(st.sampled_from(sorted(SIZES)), min_size=count, max_size=count))
    load = st.floats(0.0, 8.0)
    return [ExpertNeed(f"e{n}", SIZES[group], group, draw(load)) for n, group in enumerate(groups)]


@st.composite
def clusters(draw: st.DrawFn) -> list[HostRoom]:
    group = st.sampled_from([None, *sorted(SIZES)])
    return [
        HostRoom(f"h{n}", draw(st.integers(0, 60)), draw(st.integers(1, 2)), draw(group))
        for n in range(draw(st.integers(1, 4)))
    ]


def empty(hosts: list[HostRoom]) -> dict[str, frozenset[str]]:
    return {host.host_id: NOBODY for host in hosts}


def check(
    wanted: list[ExpertNeed], hosts: list[HostRoom], placed: dict[str, frozenset[str]]
) -> None:
    by_id = {need.expert: need for need in wanted}
    for host in hosts:
        held = [by_id[expert] for expert in placed[host.host_id]]
        assert sum(need.size_bytes for need in held) <= host.memory_bytes
        assert len({need.group for need in held} | ({host.group} - {None})) <= 1


def steps(
    wanted: list[ExpertNeed],
    hosts: list[HostRoom],
    placed: dict[str, frozenset[str]],
    config: PlacementConfig = CONFIG,
) -> list[tuple[Move, dict[str, frozenset[str]]]]:
    """All moves until there is none; each with the placement before it."""
    taken = []
    while (move := next_move(wanted, hosts, placed, config)) is not None:
        taken.append((move, placed))
        placed = apply_move(placed, move)
        check(wanted, hosts, placed)
        assert len(taken) < 400, "does not come to rest"
    return [*taken, (Move(MoveKind.POOL, "", ""), placed)]


@settings(deadline=None, max_examples=60)
@given(needs(), clusters())
def test_moves_come_to_rest_and_never_exceed_memory_or_mix_groups(
    wanted: list[ExpertNeed], hosts: list[HostRoom]
) -> None:
    *_, (_, rest) = steps(wanted, hosts, empty(hosts))
    assert next_move(wanted, hosts, rest, CONFIG) is None
    assert settle(wanted, hosts, config=CONFIG) == rest


@settings(deadline=None, max_examples=60)
@given(needs(), clusters())
def test_an_expert_is_left_out_only_where_none_but_only_copies_stand_in_its_way(
    wanted: list[ExpertNeed], hosts: list[HostRoom]
) -> None:
    rest = settle(wanted, hosts, config=CONFIG)
    by_id = {need.expert: need for need in wanted}
    copies = {e: sum(e in held for held in rest.values()) for e in by_id}
    for need in unplaced(wanted, rest):
        for host in hosts:
            held = [by_id[expert] for expert in rest[host.host_id]]
            if {other.group for other in held} | ({host.group} - {None}) <= {need.group}:
                only = sum(other.size_bytes for other in held if copies[other.expert] == 1)
                assert host.memory_bytes - only < need.size_bytes


@settings(deadline=None, max_examples=60)
@given(needs(), clusters(), st.sets(st.integers(0, 9)), st.randoms(use_true_random=False))
def test_who_is_idle_keeps_nobody_out_and_hosts_take_only_what_they_may(
    wanted: list[ExpertNeed], hosts: list[HostRoom], idle: set[int], random: object
) -> None:
    ids = [need.expert for need in wanted]
    wanted = [replace(n, load=0.0) if at in idle else n for at, n in enumerate(wanted)]
    hosts = [
        replace(host, takes=frozenset(random.sample(ids, random.randint(0, len(ids)))))  # type: ignore[attr-defined]
        for host in hosts
    ]
    *_, (_, rest) = steps(wanted, hosts, empty(hosts), YIELDING)
    assert all(rest[host.host_id] <= (host.takes or set()) for host in hosts)
    by_id = {need.expert: need for need in wanted}
    copies = {e: sum(e in held for held in rest.values()) for e in by_id}
    for need in (n for n in unplaced(wanted, rest) if n.load > 0.0):
        for host in hosts:
            held = [by_id[e] for e in rest[host.host_id]]
            alike = {other.group for other in held} | ({host.group} - {None}) <= {need.group}
            if alike and need.expert in (host.takes or set()):
                needed = [o for o in held if copies[o.expert] == 1 and o.load > 0.0]
                assert host.memory_bytes - sum(o.size_bytes for o in needed) < need.size_bytes


@settings(deadline=None, max_examples=60)
@given(needs(), clusters(), st.randoms(use_true_random=False))
def test_drifting_demand_moves_only_for_a_sufficient_gain(
    wanted: list[ExpertNeed], hosts: list[HostRoom], random: object
) -> None:
    rest = settle(wanted, hosts, config=CONFIG)
    drifted = [
        ExpertNeed(n.expert, n.size_bytes, n.group, n.load * random.uniform(0.0, 3.0))  # type: ignore[attr-defined]
        for n in wanted
    ]
    taken = steps(drifted, hosts, rest)
    if unplaced(drifted, rest):
        return  # there places change hands for demand that had none
    for (move, before), (_, after) in itertools.pairwise(taken):
        assert not unplaced(drifted, after)  # nobody loses an only copy to another's second
        if move.kind is MoveKind.POOL:
            start = before
            gain = cost(drifted, hosts, start) - cost(drifted, hosts, after)
            assert gain >= CONFIG.gain_min * cost(drifted, hosts, start) * (1 - 1e-9)


@given(needs(), clusters())
def test_what_is_pinned_stays(wanted: list[ExpertNeed], hosts: list[HostRoom]) -> None:
    rest = settle(wanted, hosts, config=CONFIG)
    pinned = {(host, expert) for host, held in rest.items() for expert in held}
    newcomer = ExpertNeed("new", 10, "llama", 1e6)
    move = next_move([*wanted, newcomer], hosts, rest, CONFIG, pinned)
    assert move is None or move.kind is MoveKind.POOL


def equal_hosts(count: int, places: int) -> list[HostRoom]:
    return [HostRoom(f"h{n}", 10 * places) for n in range(count)]


def test_a_hot_expert_is_copied_and_cold_ones_share() -> None:
    wanted = [
        ExpertNeed("hot", 10, "g", 6.0),
        *(ExpertNeed(f"c{n}", 10, "g", 0.1) for n in range(4)),
    ]
    rest = settle(wanted, equal_hosts(4, 3), config=CONFIG)
    copies = {n.expert: sum(n.expert in held for held in rest.values()) for n in wanted}
    assert copies == {"hot": 4, "c0": 1, "c1": 1, "c2": 1, "c3": 1}


def test_a_copy_gives_way_to_an_expert_without_a_place_one_move_at_a_time() -> None:
    hosts = equal_hosts(2, 1)
    placed = {"h0": frozenset({"a"}), "h1": frozenset({"a"})}
    wanted = [ExpertNeed("a", 10, "g", 5.0), ExpertNeed("b", 10, "g", 0.1)]
    first = next_move(wanted, hosts, placed, CONFIG)
    assert first == Move(MoveKind.EVICT, "h0", "a")
    second = next_move(wanted, hosts, apply_move(placed, first), CONFIG)
    assert second == Move(MoveKind.POOL, "h0", "b")


def test_an_only_copy_gives_way_to_much_more_demand_and_to_no_less() -> None:
    hosts = equal_hosts(1, 1)
    placed = {"h0": frozenset({"a"})}

    def asked(load: float) -> Move | None:
        wanted = [ExpertNeed("a", 10, "g", 1.0), ExpertNeed("b", 10, "g", load)]
        return next_move(wanted, hosts, placed, CONFIG)

    assert asked(1.04) is None
    assert asked(1.06) == Move(MoveKind.EVICT, "h0", "a")


def test_groups_stay_apart_and_an_empty_host_takes_either() -> None:
    hosts = [HostRoom("free", 100), HostRoom("l", 100, group="llama")]
    wanted = [ExpertNeed("a", 10, "llama", 1.0), ExpertNeed("b", 14, "qwen", 1.0)]
    assert settle(wanted, hosts, config=CONFIG) == {"l": {"a"}, "free": {"b"}}


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 8))
@settings(deadline=None, max_examples=30)
def test_everybody_has_a_place_when_equal_sizes_fit(count: int, hosts: int, places: int) -> None:
    assume(count <= hosts * places)
    wanted = [ExpertNeed(f"e{n}", 10, "g", 1.0 / (n + 1)) for n in range(count)]
    assert not unplaced(wanted, settle(wanted, equal_hosts(hosts, places), config=CONFIG))
