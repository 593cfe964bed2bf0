"""Choosing a host: properties over any registry, and the orders that the design promises."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from deployments.choose_host import (
    OUTDATED_RECORD_MS,
    added_latency_ms,
    choose_host,
    expected_wait_ms,
    idle_host_for,
    is_idle,
    unmeasured_swap_ms,
)
from deployments.host_record import HostRecord, PoolRecord

EXPERTS = ("a", "b", "c")
NOW = 1_700_000_000_000
expert_ids = st.sampled_from(EXPERTS)


def pool(held: str) -> tuple[PoolRecord, ...]:
    """Host memory with these experts in it."""
    return (PoolRecord("arch", 30, 10, EXPERTS, tuple(held)),)


@st.composite
def hosts(draw: st.DrawFn) -> HostRecord:
    experts = tuple(draw(st.lists(expert_ids, unique=True)))
    return HostRecord(
        host_id=draw(st.text("hijk", min_size=1, max_size=3)),
        url="http://h",
        experts=experts,
        resident=draw(st.none() | expert_ids),
        queue_depths=draw(st.dictionaries(expert_ids, st.integers(0, 50))),
        in_flight=draw(st.integers(0, 9)),
        swap_ms=draw(st.dictionaries(expert_ids, st.floats(0.1, 9_000))),
        out_of_service=draw(st.dictionaries(expert_ids, st.just("why"), max_size=1)),
        slot_state=draw(st.sampled_from(["empty", "serving", "draining", "swapping"])),
        heartbeat_ms=NOW - draw(st.integers(0, 2 * OUTDATED_RECORD_MS)),
        queued_request_ms=draw(st.sampled_from([0.0, 5.0, 80.0])),
        pools=draw(st.sampled_from([(), pool(""), pool("a"), pool("abc")])),
        load_ms=draw(st.sampled_from([0.0, 400.0])),
    )


registries = st.lists(hosts(), max_size=6, unique_by=lambda h: h.host_id)


@given(registries, expert_ids)
def test_choice_serves_the_expert_or_nobody_does(records: list[HostRecord], expert: str) -> None:
    chosen = choose_host(records, expert, NOW)
    if chosen is None:
        assert not any(record.serves(expert) for record in records)
    else:
        assert chosen in records
        assert expert in chosen.experts
        assert expert not in chosen.out_of_service


@given(registries, expert_ids, st.randoms())
def test_choice_does_not_depend_on_order(
    records: list[HostRecord], expert: str, random: object
) -> None:
    shuffled = list(records)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert choose_host(shuffled, expert, NOW) == choose_host(records, expert, NOW)


@given(registries, expert_ids)
def test_no_fresh_host_adds_less_latency_than_the_choice(
    records: list[HostRecord], expert: str
) -> None:
    chosen = choose_host(records, expert, NOW)
    fresh = [r for r in records if r.serves(expert) and NOW - r.heartbeat_ms <= OUTDATED_RECORD_MS]
    if fresh:
        assert chosen in fresh
        unmeasured_ms = unmeasured_swap_ms(r for r in records if r.serves(expert))
        least = min(added_latency_ms(r, expert, unmeasured_ms) for r in fresh)
        assert added_latency_ms(chosen, expert, unmeasured_ms) == least


@given(hosts(), expert_ids, expert_ids)
def test_one_more_in_any_queue_never_shortens_the_wait(
    record: HostRecord, expert: str, queue: str
) -> None:
    depths = {**record.queue_depths, queue: record.queue_depths.get(queue, 0) + 1}
    longer = replace(record, queue_depths=depths)
    assert expected_wait_ms(longer, expert) >= expected_wait_ms(record, expert)


@given(hosts(), expert_ids)
def test_being_resident_is_never_worse(record: HostRecord, expert: str) -> None:
    there = replace(record, resident=expert, slot_state="serving")
    assert added_latency_ms(there, expert) <= added_latency_ms(record, expert)


def host(host_id: str, **fields: object) -> HostRecord:
    base = HostRecord(host_id, "http://h", EXPERTS, swap_ms={"a": 400.0}, heartbeat_ms=NOW)
    return replace(base, **fields)  # type: ignore[arg-type]


def chosen_id(*records: HostRecord) -> str | None:
    chosen = choose_host(records, "a", NOW)
    return chosen.host_id if chosen else None


def test_resident_before_queued_before_a_new_swap() -> None:
    resident = host("r", resident="a", queue_depths={"a": 2})
    queued = host("q", resident="b", queue_depths={"a": 2})
    idle = host("i", resident="b")
    assert chosen_id(idle, queued, resident) == "r"
    assert chosen_id(idle, queued) == "q"
    assert chosen_id(idle) == "i"


def test_second_copy_is_worth_it_once_the_queue_is_longer_than_two_swaps() -> None:
    idle = host("i", resident="b")
    assert chosen_id(idle, host("r", resident="a", queue_depths={"a": 16})) == "r"
    assert chosen_id(idle, host("r", resident="a", queue_depths={"a": 17})) == "i"


def test_cheaper_measured_swap_is_preferred() -> None:
    assert chosen_id(host("slow"), host("fast", swap_ms={"a": 90.0})) == "fast"


def test_expert_never_swapped_is_taken_for_the_slowest_measured_on_its_host() -> None:
    unmeasured = host("u", swap_ms={"b": 300.0, "c": 900.0})
    assert expected_wait_ms(unmeasured, "a") == 900.0


def test_a_host_that_has_the_weights_in_memory_is_preferred() -> None:
    """Also to one that measured its swaps while it still had them, and until its swap is dearer."""
    held = host("far", swap_ms={"b": 300.0}, pools=pool("ab"))
    evicted = host("near", swap_ms={"b": 50.0}, pools=pool("a"), load_ms=2_000.0)

    def picked(other: HostRecord) -> str | None:
        best = choose_host([held, other], "b", NOW)
        return best.host_id if best else None

    assert picked(evicted) == "far"
    assert expected_wait_ms(evicted, "b") == 2_000.0
    assert picked(replace(evicted, load_ms=100.0)) == "near"
    assert picked(replace(evicted, load_ms=0.0)) == "far", "no load was measured"
    slow = replace(evicted, swap_ms={"b": 2_400.0})  # measured with the disk in it
    assert expected_wait_ms(slow, "b") == 2_400.0


def test_draining_resident_must_swap_back() -> None:
    assert expected_wait_ms(host("d", resident="a", slot_state="draining"), "a") == 400.0


def test_equal_hosts_share_by_what_they_run() -> None:
    assert chosen_id(host("x", in_flight=3), host("y", in_flight=2)) == "y"


def test_a_host_that_has_never_swapped_is_not_avoided_for_it() -> None:
    known = host("k", queue_depths={"b": 1}, queued_request_ms=50.0)
    assert chosen_id(known, host("n", swap_ms={})) == "n"


def test_a_new_swap_counts_for_everybody_at_the_host() -> None:
    busy = host("b", resident="b", in_flight=4)
    queued = host("q", resident="b", queue_depths={"c": 2}, queued_request_ms=50.0)
    assert added_latency_ms(busy, "a") == 400.0 + 400.0 * 5
    assert chosen_id(busy, queued) == "q"


def test_host_not_heard_of_for_long_is_the_last_resort() -> None:
    silent = host("s", resident="a", heartbeat_ms=NOW - OUTDATED_RECORD_MS - 1)
    assert chosen_id(silent, host("i", resident="b")) == "i"
    assert chosen_id(silent) == "s"


def test_host_that_does_not_serve_it_has_no_wait_to_offer() -> None:
    assert expected_wait_ms(host("o", out_of_service={"a": "canary"}), "a") == float("inf")
    assert chosen_id(host("o", experts=("b",))) is None


# --- moving what waits to an idle host ------------------------------------------------------------


@given(registries, expert_ids, st.sampled_from("hijk"))
def test_only_what_waits_behind_another_expert_moves_and_only_to_an_idle_host(
    records: list[HostRecord], expert: str, host_id: str
) -> None:
    target = idle_host_for(records, host_id, expert, NOW)
    if target is None:
        return
    here = next(record for record in records if record.host_id == host_id)
    assert here.queue_depths[expert] > 0
    assert here.resident != expert, "none of the expert's requests can be running here"
    assert here.slot_state in ("serving", "draining")
    assert here.in_flight > 0
    assert target is not here
    assert target.serves(expert)
    assert is_idle(target)
    assert NOW - target.heartbeat_ms <= OUTDATED_RECORD_MS


WAITS_HERE = host("h", resident="b", in_flight=2, queue_depths={"a": 3}, queued_request_ms=50.0)


def moved_to(*others: HostRecord, here: HostRecord = WAITS_HERE) -> str | None:
    target = idle_host_for([here, *others], "h", "a", NOW)
    return target.host_id if target else None


def test_what_waits_behind_running_work_moves_to_the_idle_host_that_is_soonest() -> None:
    idle, dearer = host("i", resident="c"), host("d", swap_ms={"a": 700.0})
    assert moved_to() is None
    assert moved_to(dearer) == "d"
    assert moved_to(dearer, idle) == "i"
    assert moved_to(dearer, idle, host("r", resident="a")) == "r"
    assert moved_to(idle, here=replace(WAITS_HERE, slot_state="draining")) == "i"


def test_nothing_moves_that_may_be_running_or_about_to() -> None:
    idle = host("i")
    assert moved_to(idle, here=replace(WAITS_HERE, resident="a", slot_state="draining")) is None
    assert moved_to(idle, here=replace(WAITS_HERE, resident=None, slot_state="swapping")) is None
    assert moved_to(idle, here=replace(WAITS_HERE, in_flight=0)) is None, "it turns at once"


def test_nothing_moves_to_the_disk_or_to_a_much_slower_swap() -> None:
    held = host("e", swap_ms={"b": 50.0}, pools=pool("ab"))
    assert moved_to(held) == "e"
    assert moved_to(replace(held, pools=pool("b"))) is None
    assert moved_to(replace(held, swap_ms={"b": 9_000.0})) is None
