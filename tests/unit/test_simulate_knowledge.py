"""What the simulated gateway knows and when, memory over nodes, and the bound on swaps."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.host_directory import add_dispatched
from deployments.host_record import HostRecord
from deployments.simulate.belady import fewest_swaps
from deployments.simulate.cluster import Cluster
from deployments.simulate.floor import Floor, RuleBroken, replay
from deployments.simulate.gateway_view import CHANGE_MS, HEARTBEAT_MS, LISTING_MS, GatewayView
from deployments.simulate.job import JobState
from deployments.simulate.ours import Ours
from deployments.simulate.workload import Arrival, Workload
from deployments.swap.config import SchedulerConfig
from deployments.swap.core import Scheduler
from experts.strict_yaml import load_text

IDLE = HostRecord("h", "http://h", ("a", "b"), resident="a", swap_ms={"a": 400.0})


def nodes(count: int, memory: str) -> Cluster:
    text = f"""
accelerators: {{count: 2, device_bytes: 80GiB, kv_reserve_bytes: 10GiB, usd_per_hour: 3.6}}
link: {{gigabytes_per_s: 10, efficiency: 0.5, swap_fixed_ms: 100}}
host: {{count: {count}, memory_bytes: {memory}, disk_gigabytes_per_s: 1}}
engine: {{in_flight_max: 4, prefill_tokens_per_s: 1000,
         decode_tokens_per_s_single: 100, decode_tokens_per_s_limit: 1000}}
experts: {{bytes: 2000000000}}
"""
    return load_text(text, Cluster, file="test.yaml")


def load_of(*experts: str, every_ms: float = 300.0) -> Workload:
    arrivals = tuple(Arrival(n * every_ms, expert, 100, 11) for n, expert in enumerate(experts))
    return Workload(tuple(sorted(set(experts))), arrivals, len(experts) * every_ms)


# --- add_dispatched ------------------------------------------------------------------------------


def test_a_slot_out_of_work_turns_for_whoever_was_sent_there() -> None:
    seen = add_dispatched(IDLE, {"b": 1})
    assert (seen.resident, seen.slot_state, seen.queue_depths) == (None, "swapping", {"b": 1})


@pytest.mark.parametrize("busy", [{"in_flight": 1}, {"queue_depths": {"a": 1}}])
def test_a_slot_with_work_does_not_turn_at_once(busy: dict[str, object]) -> None:
    record = HostRecord("h", "http://h", ("a", "b"), resident="a", **busy)  # type: ignore[arg-type]
    assert add_dispatched(record, {"b": 1}).resident == "a"
    assert add_dispatched(IDLE, {"a": 1, "b": 1}).resident == "a"


# --- the gateway's picture -----------------------------------------------------------------------


def picture() -> tuple[GatewayView, list[Scheduler]]:
    schedulers = [Scheduler(SchedulerConfig(), ("a", "b"), "a") for _ in range(2)]
    return GatewayView(schedulers, ("a", "b")), schedulers


def tell(view: GatewayView, scheduler: Scheduler, name: str, expert: str, at_ms: float) -> None:
    view.touch(0, at_ms)
    scheduler.arrive(name, expert, now_ms=at_ms)
    view.note(0, at_ms)


def test_the_gateway_learns_of_a_queue_at_the_next_listing_after_a_heartbeat() -> None:
    view, (first, _) = picture()
    for number in range(40):
        tell(view, first, f"r{number}", "a", 10.0)  # slot 0 is full and has a queue
    assert view.choose("a", 20.0) == 0  # as far as anybody knows
    view.take_listing(LISTING_MS + HEARTBEAT_MS)
    assert view.choose("a", LISTING_MS + HEARTBEAT_MS + 1.0) == 1


def test_a_change_of_resident_is_written_early() -> None:
    view, (first, _) = picture()
    tell(view, first, "r", "b", HEARTBEAT_MS + 1.0)  # out of work: it turns to b at once
    view.take_listing(2 * LISTING_MS + CHANGE_MS)
    assert view.choose("a", 2 * LISTING_MS + CHANGE_MS) == 1


def test_only_hosts_that_serve_the_expert_are_chosen() -> None:
    view, _ = picture()
    view.place(0, ["b"])
    view.place(1, ["a"])
    view.take_listing(2 * LISTING_MS)
    assert view.choose("b", 3 * LISTING_MS) == 0
    assert view.choose("a", 3 * LISTING_MS) == 1


# --- memory of several nodes ---------------------------------------------------------------------


def test_a_load_makes_room_but_not_from_what_is_to_be_kept() -> None:
    floor = Floor(nodes(1, "4GiB"), ("a", "b", "c"), 1e6)
    assert floor.in_memory(0) == {"a", "b"}
    assert not floor.load(0, "c", keep=("a", "b"))
    assert floor.load(0, "c", keep=("a",))
    assert floor.in_memory(0) == {"a"}  # c is not there before it has been read


def test_memory_is_filled_within_its_size() -> None:
    floor = Floor(nodes(2, "4GiB"), ("a", "b", "c"), 1e6)
    with pytest.raises(RuleBroken):
        floor.fill(1, ["a", "b", "c"])
    floor.fill(1, ["c"])
    assert floor.in_memory(1) == {"c"}


def test_what_is_announced_is_read_while_another_expert_runs() -> None:
    on = nodes(1, "2GiB")  # one expert in memory, two slots
    load = load_of("a", "a", "b", "b", "a", "a", "b", "b")
    policies: list[Ours] = []

    def make(floor: Floor) -> Ours:
        policies.append(Ours(floor))
        return policies[-1]

    tally = replay(on, load, make, patience_ms=1e6)
    assert all(job.state is JobState.SERVED for job in tally.jobs)
    assert tally.disk_loads > 0


def test_nodes_too_small_for_all_serve_everybody_and_move_towards_demand() -> None:
    experts = ["d", "d", "b", "c", "d", "d", "d", "a"] * 60
    policies: list[Ours] = []

    def make(floor: Floor) -> Ours:
        policies.append(Ours(floor))
        return policies[-1]

    tally = replay(nodes(2, "6GiB"), load_of(*experts, every_ms=150.0), make, patience_ms=1e6)
    assert all(job.state is JobState.SERVED for job in tally.jobs)
    placement = policies[0].placement
    assert placement is not None
    assert placement.moves > 0
    copies = [sum(e in held for held in placement._held.values()) for e in "abcd"]
    assert copies[3] == 2  # the hot expert is on both nodes, where it was not at first
    assert min(copies) >= 1


# --- the fewest swaps ----------------------------------------------------------------------------


def test_fewest_swaps_by_hand() -> None:
    assert fewest_swaps("abcabc", 1) == 6
    assert fewest_swaps("aabbcc", 1) == 3
    assert fewest_swaps("abcabc", 2) == 4  # a b c(b goes) a b(a or c goes) c
    assert fewest_swaps("", 3) == 0


def misses_of_every_choice(sequence: str, slots: int) -> int:
    """The least over all choices of victims, tried one by one."""
    states: dict[frozenset[str], int] = {frozenset(): 0}
    for expert in sequence:
        following: dict[frozenset[str], int] = {}
        for held, misses in states.items():
            if expert in held:
                options = [(held, misses)]
            elif len(held) < slots:
                options = [(held | {expert}, misses + 1)]
            else:
                options = [(held - {out} | {expert}, misses + 1) for out in held]
            for state, count in options:
                following[state] = min(count, following.get(state, count))
        states = following
    return min(states.values())


@settings(max_examples=60)
@given(st.text("abcde", max_size=14), st.integers(1, 3))
def test_no_choice_of_victims_swaps_less(sequence: str, slots: int) -> None:
    assert fewest_swaps(sequence, slots) == misses_of_every_choice(sequence, slots)


@given(st.text("abcd", max_size=30))
def test_more_slots_never_swap_more(sequence: str) -> None:
    counts = [fewest_swaps(sequence, slots) for slots in range(1, 6)]
    assert all(more <= less for less, more in itertools.pairwise(counts))
