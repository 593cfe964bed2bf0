"""When the planner asks, and what it takes as true: pauses, setbacks, silence, other formats."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deployments.expert_load import ExpertLoads
from deployments.host_record import HostRecord, PoolRecord
from deployments.placement import Move, MoveKind, PlacementConfig
from deployments.placement_planner import MoveOutcome, PlacementPlanner, PlannerConfig, Question

CONFIG = PlannerConfig(
    half_life_ms=10_000,
    pause_ms=1_000,
    silent_ms=2_000,
    refused_ms=10_000,
    failed_ms=30_000,
    backoff_ms_max=45_000,
)
ALL = ("a", "b")
POOL_B = Move(MoveKind.POOL, "h1", "b")


def host(name: str, pooled: str, places: int = 2, **more: object) -> HostRecord:
    pool = PoolRecord("arch", places * 10, 10, ALL, tuple(pooled))
    record = HostRecord(name, f"http://{name}", ALL, pools=(pool,), heartbeat_ms=1)
    return replace(record, **more)  # type: ignore[arg-type]


class Watch:
    """A planner that sees the same hosts, alive, every half second."""

    def __init__(self, *hosts: HostRecord, at_ms: float = 0.0) -> None:
        self.planner = PlacementPlanner(CONFIG)
        self.hosts = {record.host_id: record for record in hosts}
        self.silent: set[str] = set()
        self.now_ms = at_ms
        self.planner.observe(hosts, at_ms)

    def wait(self, ms: float) -> Watch:
        end_ms = self.now_ms + ms
        while self.now_ms < end_ms:
            self.now_ms = min(end_ms, self.now_ms + 500.0)
            for name, record in self.hosts.items():
                if name not in self.silent:
                    self.hosts[name] = replace(record, heartbeat_ms=int(self.now_ms))
            self.planner.observe(self.hosts.values(), self.now_ms)
        return self

    def change(self, name: str, **changes: object) -> None:
        self.hosts[name] = replace(self.hosts[name], **changes)  # type: ignore[arg-type]

    def question(self) -> Question | None:
        return self.planner.question(self.now_ms)

    def move(self) -> Move | None:
        question = self.question()
        return None if question is None else question.answer()

    def make(self, outcome: MoveOutcome) -> Move:
        move = self.move()
        assert move is not None
        self.planner.begin(move)
        self.planner.end(move, outcome, self.now_ms)
        return move


def test_demand_is_watched_before_the_first_move() -> None:
    watch = Watch(host("h1", "a"))
    assert watch.wait(4_500).question() is None
    assert watch.wait(500).move() == POOL_B


def test_after_a_move_comes_a_pause_and_a_record_that_is_newer() -> None:
    watch = Watch(host("h1", "a")).wait(5_000)
    watch.make(MoveOutcome.DONE)
    watch.silent = {"h1"}
    assert watch.wait(1_500).question() is None, "its record is from before the move"
    watch.silent = set()
    assert watch.wait(500).move() == POOL_B, "it says so itself: the weights are not there"


def test_the_answer_nothing_is_followed_by_a_pause_too() -> None:
    watch = Watch(host("h1", "a", places=1)).wait(5_000)
    assert watch.question() is not None
    assert watch.move() is None
    watch.planner.at_rest(watch.now_ms)
    assert watch.wait(500).question() is None
    assert watch.wait(500).question() is not None


def test_a_command_that_a_host_still_works_on_holds_up_everybody() -> None:
    watch = Watch(host("h1", "a"), host("h2", "a", moving="b")).wait(5_000)
    assert watch.question() is None
    watch.change("h2", moving=None)
    assert watch.wait(500).move() is not None


@pytest.mark.parametrize(
    ("outcome", "waits_ms"),
    [
        (MoveOutcome.REFUSED, [10_000, 20_000, 40_000, 45_000, 45_000]),
        (MoveOutcome.FAILED, [30_000, 45_000, 45_000]),
    ],
)
def test_what_did_not_work_is_tried_ever_more_rarely(
    outcome: MoveOutcome, waits_ms: list[int]
) -> None:
    watch = Watch(host("h1", "a")).wait(5_000)
    for wait_ms in waits_ms:
        assert watch.make(outcome) == POOL_B
        assert watch.wait(wait_ms - 500).move() is None
        watch.wait(500)
    assert watch.make(MoveOutcome.DONE) == POOL_B
    watch.wait(1_000)
    assert watch.make(outcome) == POOL_B
    assert watch.wait(waits_ms[0]).move() == POOL_B, "a success wipes the slate"


def test_what_one_host_refuses_another_is_asked_for() -> None:
    watch = Watch(host("h1", "a"), host("h2", "a")).wait(5_000)
    assert watch.make(MoveOutcome.REFUSED) == POOL_B
    assert watch.wait(1_000).move() == Move(MoveKind.POOL, "h2", "b")


def test_an_eviction_that_was_refused_is_not_repeated_at_once() -> None:
    watch = Watch(host("h1", "a", places=1), host("h2", "a", places=1)).wait(5_000)
    watch.change("h1", work={"b": (1, 5_000)})  # read from disk, and gone again
    assert watch.wait(500).make(MoveOutcome.REFUSED) == Move(MoveKind.EVICT, "h1", "a")
    assert watch.wait(1_000).make(MoveOutcome.REFUSED) == Move(MoveKind.EVICT, "h2", "a")
    assert watch.wait(1_000).move() is None


def test_a_silent_host_neither_takes_nor_gives() -> None:
    watch = Watch(host("h1", "a")).wait(5_000)
    watch.silent = {"h1"}
    assert watch.wait(2_500).move() is None
    watch.silent = set()
    assert watch.wait(500).move() == POOL_B
    full = Watch(host("h1", "a", places=1), host("h2", "a", places=1)).wait(5_000)
    full.silent = {"h1", "h2"}
    full.change("h1", work={"b": (1, 5_000)})
    assert full.wait(2_500).move() is None


def test_a_new_life_of_a_host_starts_without_the_old_ones_setbacks() -> None:
    watch = Watch(host("h1", "a")).wait(5_000)
    watch.make(MoveOutcome.FAILED)
    watch.hosts = {"h2": host("h2", "a")}
    assert watch.wait(1_000).move() == Move(MoveKind.POOL, "h2", "b")
    assert watch.planner._setbacks == {}


def test_nothing_is_asked_for_that_may_not_or_cannot_be() -> None:
    watch = Watch(host("h1", "a", out_of_service={"b": "cut short"})).wait(5_000)
    assert watch.question() is None
    old = HostRecord("old", "http://old", ALL)  # says nothing of its memory
    assert Watch(old).wait(5_000).question() is None
    dead_engine = host("h1", "")
    (pool,) = dead_engine.pools
    assert (
        Watch(replace(dead_engine, pools=(replace(pool, entry_bytes=0),))).wait(5_000).question()
        is None
    )


def test_places_are_exact_where_devices_hold_weights_in_other_formats() -> None:
    wide = PoolRecord("arch", 59, 20, ("a", "b", "c"), ("a", "b"))  # two places, not three
    slim = PoolRecord("arch", 30, 10, ("a", "b", "c"), ("a", "b", "c"))  # three, all taken
    records = [HostRecord("w", "", wide.experts, pools=(wide,), work={})]
    records.append(HostRecord("s", "", slim.experts, pools=(slim,), work={}))
    question = Watch(*records).wait(5_000).question()
    assert question is not None
    assert [room.memory_bytes // 20 for room in question.rooms] == [2, 3]
    assert {need.size_bytes for need in question.needs} == {20}


def test_load_is_the_share_of_slots_kept_busy_and_fades() -> None:
    loads = ExpertLoads(half_life_ms=10_000)
    for second in range(201):
        totals = {"a": (second, 500 * second), "b": (second, 250 * second)}
        loads.observe([HostRecord("h1", "", ALL, work=totals)], 1_000.0 * second)
    assert loads.load("a") == pytest.approx(0.5, rel=0.04)
    assert loads.load("b") == pytest.approx(loads.load("a") / 2)
    before = loads.load("a")
    loads.observe([], 210_000.0)
    assert loads.load("a") == pytest.approx(before / 2)


def test_a_hosts_past_does_not_count_when_it_is_first_seen() -> None:
    loads = ExpertLoads(half_life_ms=10_000)
    loads.observe([HostRecord("h1", "", ALL, work={"a": (9, 9_000_000)})], 0.0)
    assert loads.load("a") == 0.0
    loads.observe([HostRecord("h1", "", ALL, work={"a": (9, 9_000_000), "b": (1, 100)})], 1.0)
    assert loads.load("a") == 0.0 < loads.load("b")
    loads.observe([HostRecord("h2", "", ALL, work={"a": (1, 700)})], 2.0)
    assert loads.load("a") == 0.0, "another life of it, with totals of its own"


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong in ({"half_life_ms": 0.0}, {"pause_ms": 100.0}):
        with pytest.raises(ValueError, match="_ms="):
            PlannerConfig(**wrong)
    assert PlannerConfig().placement == PlacementConfig(idle_yields=True)
