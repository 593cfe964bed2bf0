"""The gateway's host directory, with a registry and clocks made by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from deployments.host_directory import HostDirectory
from deployments.host_record import HostRecord, RegistrySnapshot
from experts.errors import StateUnavailable

A = HostRecord("a", "http://a", ("x",), resident="x", heartbeat_ms=1)
B = HostRecord("b", "http://b", ("x", "y"), resident="y", heartbeat_ms=1)


@dataclass
class World:
    """A registry with a set answer, and both clocks. ``listed`` None: the store is away."""

    listed: tuple[HostRecord, ...] | None = (A, B)
    epoch: int = 1
    mono_ms: float = 0.0
    wall_ms: float = 1_000_000.0
    asked: int = 0
    directory: HostDirectory = field(init=False)

    def __post_init__(self) -> None:
        self.directory = HostDirectory(
            self,
            min_refresh_ms=100,
            grace_ms=6_000,
            mono_ms=lambda: self.mono_ms,
            wall_ms=lambda: self.wall_ms,
        )

    async def snapshot(self) -> RegistrySnapshot:
        self.asked += 1
        if self.listed is None:
            raise StateUnavailable("list_hosts")
        return RegistrySnapshot(self.epoch, self.listed)

    async def refresh(self, after_ms: float = 100) -> None:
        self.mono_ms += after_ms
        self.wall_ms += after_ms
        await self.directory.refresh()

    def ids(self, expert: str = "x") -> list[str]:
        return [record.host_id for record in self.directory.hosts_for(expert)]


@pytest.fixture
async def world() -> World:
    world = World()
    await world.refresh()
    return world


def test_nothing_is_known_before_the_first_listing() -> None:
    directory = World().directory
    assert (directory.stale, directory.age_ms, directory.records) == (True, float("inf"), [])


async def test_lists_hosts_by_expert(world: World) -> None:
    assert (world.ids("x"), world.ids("y"), world.ids("z")) == (["a", "b"], ["b"], [])
    assert not world.directory.stale


async def test_store_is_asked_no_more_often_than_agreed(world: World) -> None:
    for _ in range(5):
        await world.refresh(after_ms=10)
    assert world.asked == 1
    await world.refresh(after_ms=50)
    assert world.asked == 2


async def test_outage_keeps_the_last_hosts_and_says_how_old_they_are(world: World) -> None:
    world.listed = None
    await world.refresh(after_ms=700)
    assert (world.ids(), world.directory.stale, world.directory.age_ms) == (["a", "b"], True, 700)


async def test_host_that_left_is_dropped(world: World) -> None:
    world.listed = (B,)
    await world.refresh()
    assert world.ids() == ["b"]


@pytest.mark.parametrize("trouble", ["outage", "data lost unseen"])
async def test_hosts_get_time_to_register_again_after(trouble: str, world: World) -> None:
    if trouble == "outage":
        world.listed = None
        await world.refresh()
    else:
        world.epoch = 2
    world.listed = ()
    await world.refresh()
    assert (world.ids(), world.directory.stale) == (["a", "b"], False)
    world.listed = (replace(A, heartbeat_ms=9),)
    await world.refresh(after_ms=5_999)
    assert world.ids() == ["a", "b"]
    await world.refresh()
    assert world.ids() == ["a"]


async def test_suspect_is_avoided_until_then(world: World) -> None:
    world.directory.mark_suspect("a", world.wall_ms + 500)
    await world.refresh(after_ms=499)
    assert world.ids() == ["b"]
    assert len(world.directory.records) == 2
    await world.refresh(after_ms=1)
    assert world.ids() == ["a", "b"]


async def test_suspicion_lasts_a_minute_at_most(world: World) -> None:
    world.directory.mark_suspect("a", world.wall_ms + 1e12)
    await world.refresh(after_ms=60_000)
    assert world.ids() == ["a", "b"]


async def test_dispatched_requests_count_until_the_next_heartbeat(world: World) -> None:
    for host in ("a", "b", "b"):
        world.directory.note_dispatched(host, "x")
    a, b = world.directory.hosts_for("x")
    assert (a.in_flight, dict(a.queue_depths)) == (1, {})  # resident there: it runs
    assert (b.in_flight, dict(b.queue_depths)) == (0, {"x": 2})  # not resident: it waits
    world.listed = (A, replace(B, heartbeat_ms=2))
    await world.refresh()
    a, b = world.directory.hosts_for("x")
    assert (a.in_flight, dict(b.queue_depths)) == (1, {})


async def test_what_is_noted_of_hosts_that_left_is_forgotten(world: World) -> None:
    note: list[Callable[[], None]] = [
        lambda: world.directory.note_dispatched("a", "x"),
        lambda: world.directory.mark_suspect("a", world.wall_ms + 50_000),
    ]
    for act in note:
        act()
    world.listed = (B,)
    await world.refresh()
    for act in note:
        act()
    world.listed = (A, B)
    await world.refresh()
    assert world.directory.hosts_for("x") == [A, B]
