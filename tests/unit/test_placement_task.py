"""The shell of placement: who acts, when nobody does, and what is told of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

import pytest

from deployments.host_record import HostRecord, PoolRecord
from deployments.placement import Move, MoveKind
from deployments.placement_planner import MoveOutcome, PlacementPlanner, PlannerConfig
from experts.errors import StateUnavailable
from gateway.placement_client import MoveAnswer
from gateway.placement_task import PlacementTask
from gateway.state.moves import MoveRecord

HOST = HostRecord(
    "h1", "http://h1:9", ("a", "b"), pools=(PoolRecord("arch", 20, 10, ("a", "b"), ("a",)),)
)
POOL_B = Move(MoveKind.POOL, "h1", "b")
DONE = MoveAnswer(MoveOutcome.DONE)


@dataclass
class World:
    """Everything round the task. ``lease``: None while the store is away."""

    lease: bool | None = True
    stale: bool = False
    records: list[HostRecord] = field(default_factory=lambda: [HOST])
    answer: MoveAnswer = DONE
    now_ms: float = 0.0
    asked: list[tuple[str, Move]] = field(default_factory=list)
    told: list[MoveRecord] = field(default_factory=list)
    counted: list[tuple[str, str]] = field(default_factory=list)
    go: asyncio.Event = field(default_factory=asyncio.Event)
    released: int = 0

    def __post_init__(self) -> None:
        self.go.set()
        self.task = PlacementTask(
            PlacementPlanner(PlannerConfig(half_life_ms=2_000, pause_ms=1_000)),
            self,
            hosts=self,
            commands=self,
            moves=self,
            count=lambda kind, outcome: self.counted.append((kind, outcome)),
            now_ms=lambda: self.now_ms,
            wall_ms=lambda: 1_700_000_000_000,
        )

    @property
    def held(self) -> bool:
        return self.lease is True

    async def hold(self) -> bool:
        if self.lease is None:
            raise StateUnavailable("hold_lease")
        return self.lease

    async def release(self) -> None:
        self.released += 1

    async def move(self, url: str, move: Move) -> MoveAnswer:
        self.asked.append((url, move))
        await self.go.wait()
        return self.answer

    async def append(self, move: MoveRecord) -> None:
        if self.lease is None:
            raise StateUnavailable("append_move")
        self.told.append(move)

    async def ticks(self, count: int) -> None:
        for _ in range(count):
            self.now_ms += 1_000.0
            self.records = [replace(r, heartbeat_ms=int(self.now_ms)) for r in self.records]
            await self.task.tick()
            await asyncio.sleep(0)


async def test_the_holder_of_the_lease_moves_counts_and_tells(
    caplog: pytest.LogCaptureFixture,
) -> None:
    world = World(answer=MoveAnswer(MoveOutcome.REFUSED, "it is resident"))
    with caplog.at_level("INFO", "gateway.placement_task"):
        await world.ticks(3)
    assert world.asked == [("http://h1:9", POOL_B)]
    assert world.counted == [("pool", "refused")]
    (told,) = world.told
    assert (told.kind, told.host, told.expert, told.outcome) == ("pool", "h1", "b", "refused")
    fields = caplog.records[-1].__dict__["fields"]
    assert (fields["expert"], fields["reason"]) == ("b", "it is resident")


@pytest.mark.parametrize("changes", [{"lease": False}, {"lease": None}, {"stale": True}])
async def test_nobody_moves_without_the_lease_the_store_or_a_fresh_list(
    changes: dict[str, bool | None],
) -> None:
    world = World()
    for name, value in changes.items():
        setattr(world, name, value)
    await world.ticks(10)
    assert world.asked == []
    world.lease, world.stale = True, False
    await world.ticks(2 if changes.get("stale") else 1)
    assert world.asked == [("http://h1:9", POOL_B)], "and it goes on when all is well again"


async def test_a_worker_that_only_watched_takes_over_at_once() -> None:
    world = World(lease=False)
    await world.ticks(5)
    world.lease = True
    await world.ticks(1)
    assert len(world.asked) == 1


async def test_one_move_at_a_time_and_the_outcome_survives_an_outage_of_the_store() -> None:
    world = World()
    world.go.clear()
    await world.ticks(6)
    assert len(world.asked) == 1
    world.lease = None
    world.go.set()
    await world.ticks(1)
    assert (world.counted, world.told) == ([("pool", "done")], [])


async def test_closing_leaves_the_move_to_its_host_and_the_lease_to_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nobody knows how it ends, so it has not failed."""
    world = World()
    world.go.clear()
    world.task.start()
    await world.ticks(2)
    with caplog.at_level("INFO", "gateway.placement_task"):
        await world.task.aclose()
    assert world.counted == [("pool", "left")]
    (line,) = caplog.records
    assert (line.levelname, line.__dict__["fields"]["outcome"]) == ("INFO", "left")
    assert world.told == [], "the store is about to be closed as well"
    assert world.released == 1
    await World(lease=False).task.aclose()
