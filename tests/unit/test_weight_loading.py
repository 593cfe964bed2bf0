"""Commands of placement at a host's slot: they cost nobody who waits, and do not collide."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from deployments.swap import loading
from deployments.swap.config import SchedulerConfig
from deployments.swap.driver import SlotDriver, SwapReport
from deployments.swap.work import Work, WorkMeter
from experts.errors import ExpertOutOfService, HostUnavailable, PlacementRefused, SwapFailed
from tests.sim.virtual_time import now_ms, run_virtual

CONFIG = SchedulerConfig(in_flight_max=2, min_residency_ms=1_000, age_bound_ms=5_000)


class Disk:
    """A pool of ``places`` and a disk that takes a second; ``bad`` experts cannot be read."""

    def __init__(self, pooled: str = "a", places: int = 3, bad: str = "") -> None:
        self.in_pool = set(pooled)
        self.places = places
        self.bad = bad
        self.reads: list[str] = []
        self.evicted: list[str] = []
        self.busy = False
        self.stuck = False

    async def prefetch(self, expert: str, keep: Sequence[str]) -> bool:
        assert not self.busy, "two loads at once"
        self.reads.append(expert)
        spare = self.in_pool - set(keep)
        if len(self.in_pool) >= self.places and not spare:
            return False
        self.busy = True
        try:
            await asyncio.sleep(1.0)
        finally:
            self.busy = False
        if expert in self.bad:
            raise SwapFailed(expert, "cut short")
        if len(self.in_pool) >= self.places:
            self.in_pool.discard(min(spare))
        self.in_pool.add(expert)
        return True

    async def evict(self, expert: str) -> None:
        assert not self.busy, "an eviction beside a load"
        await asyncio.sleep(0.01)
        if self.stuck:
            raise RuntimeError("the engine is gone")
        self.in_pool.discard(expert)
        self.evicted.append(expert)

    async def make_resident(self, expert: str) -> SwapReport:
        await asyncio.sleep(0.05 if expert in self.in_pool else 1.0)
        self.in_pool.add(expert)
        return SwapReport(expert, 50.0, 0.0, 1)


def drive(disk: Disk, body: Callable[[SlotDriver], Awaitable[None]]) -> None:
    async def main() -> None:
        driver = SlotDriver(CONFIG, "abcd", disk, clock=now_ms, resident="a", prefetcher=disk)
        await driver.start()
        try:
            await body(driver)
        finally:
            await driver.aclose()

    run_virtual(main())


async def use(driver: SlotDriver, expert: str, seconds: float) -> None:
    async with driver.lease(expert, request_id=expert):
        await asyncio.sleep(seconds)


async def refused(command: Awaitable[None]) -> str:
    with pytest.raises(PlacementRefused) as caught:
        await command
    return caught.value.reason


def test_pooling_takes_free_room_while_the_resident_serves() -> None:
    disk = Disk()

    async def body(driver: SlotDriver) -> None:
        serving = asyncio.create_task(use(driver, "a", 5.0))
        await asyncio.sleep(0.1)
        first = asyncio.create_task(driver.loading.pool("b"))
        await asyncio.sleep(0.1)
        assert driver.loading.moving == "b"
        await asyncio.gather(first, driver.loading.pool("b"))  # joins the load under way
        assert driver.loading.moving is None
        await driver.loading.pool("b")
        assert (disk.reads, disk.in_pool) == (["b"], {"a", "b"})
        assert not serving.done()
        await serving

    drive(disk, body)


def test_pooling_pushes_nobody_out() -> None:
    disk = Disk("abc", places=3)

    async def body(driver: SlotDriver) -> None:
        assert "no free room" in await refused(driver.loading.pool("d"))
        assert disk.in_pool == set("abc")
        await driver.loading.evict("c")
        await driver.loading.pool("d")
        assert disk.in_pool == set("abd")

    drive(disk, body)


def test_a_refused_command_does_not_hold_up_loading_ahead() -> None:
    disk = Disk("abc", places=3)

    async def body(driver: SlotDriver) -> None:
        serving = asyncio.create_task(use(driver, "a", 2.0))
        await refused(driver.loading.pool("d"))
        waiting = asyncio.create_task(use(driver, "d", 0.1))
        await asyncio.sleep(0.01)
        assert disk.reads == ["d", "d"]
        await asyncio.gather(serving, waiting)

    drive(disk, body)


def test_pooling_yields_to_whoever_waits_for_the_disk() -> None:
    disk = Disk()

    async def body(driver: SlotDriver) -> None:
        serving = asyncio.create_task(use(driver, "a", 3.0))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(use(driver, "b", 0.1))
        await asyncio.sleep(0.1)
        assert disk.reads == ["b"], "it is loaded ahead of its swap"
        assert "busy with 'b'" in await refused(driver.loading.pool("c"))
        await asyncio.gather(serving, waiting)
        await driver.loading.pool("c")

    drive(disk, body)


def test_pooling_comes_after_a_waiter_whose_weights_found_no_room() -> None:
    disk = Disk("a", places=1)

    async def body(driver: SlotDriver) -> None:
        serving = asyncio.create_task(use(driver, "a", 1.0))
        await asyncio.sleep(0.01)
        waiting = asyncio.create_task(use(driver, "b", 0.1))
        await asyncio.sleep(0.01)
        assert disk.reads == ["b"]
        assert "'b' is waited for" in await refused(driver.loading.pool("c"))
        await asyncio.gather(serving, waiting)

    drive(disk, body)


def test_pooling_what_a_swap_is_bringing_in_is_refused() -> None:
    disk = Disk()
    disk.prefetch = _never  # type: ignore[method-assign]

    async def body(driver: SlotDriver) -> None:
        swap = asyncio.create_task(use(driver, "b", 0.1))
        await asyncio.sleep(0.5)
        assert "a swap is bringing it in" in await refused(driver.loading.pool("b"))
        await swap

    drive(disk, body)


async def _never(expert: str, keep: Sequence[str]) -> bool:
    raise AssertionError("the swap reads the disk itself")


def test_bad_weights_are_out_of_service_and_said_to_be() -> None:
    async def body(driver: SlotDriver) -> None:
        for _ in range(2):
            with pytest.raises(ExpertOutOfService, match="cut short"):
                await driver.loading.pool("b")

    disk = Disk(bad="b")
    drive(disk, body)
    assert disk.reads == ["b"]


def test_nobody_who_is_needed_is_let_go() -> None:
    disk = Disk("abc")

    async def body(driver: SlotDriver) -> None:
        serving = asyncio.create_task(use(driver, "a", 2.0))
        await asyncio.sleep(0.01)
        assert await refused(driver.loading.evict("a")) == "it is resident"
        turning = asyncio.create_task(use(driver, "b", 1.0))
        waiting = asyncio.create_task(use(driver, "c", 1.0))
        await asyncio.sleep(0.01)
        for _ in range(2):  # while it drains, then while it swaps
            assert await refused(driver.loading.evict("b")) == "the slot is about to turn to it"
            reason = await refused(driver.loading.evict("c"))
            assert reason == "requests for it wait or are announced"
            await asyncio.sleep(2.02 - 0.01)
        await asyncio.gather(serving, turning, waiting)
        driver.announce("a")
        assert "announced" in await refused(driver.loading.evict("a"))
        assert disk.evicted == []

    drive(disk, body)


def test_evicting_is_idempotent_and_what_was_evicted_can_still_be_asked_for() -> None:
    disk = Disk("abc")

    async def body(driver: SlotDriver) -> None:
        await driver.loading.evict("c")
        await driver.loading.evict("c")
        assert disk.evicted == ["c"]
        await use(driver, "c", 0.1)
        assert "c" in disk.in_pool

    drive(disk, body)


def test_an_eviction_that_does_not_come_about_is_not_reported_as_done() -> None:
    disk = Disk("ab")
    disk.stuck = True

    async def body(driver: SlotDriver) -> None:
        assert "did not let go" in await refused(driver.loading.evict("b"))
        assert driver.loading.moving is None

    drive(disk, body)


def test_commands_end_in_bounded_time_and_the_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "COMMAND_MS_MAX", 300.0)
    disk = Disk()

    async def body(driver: SlotDriver) -> None:
        assert "goes on after 300 ms" in await refused(driver.loading.pool("b"))
        assert driver.loading.moving == "b"
        assert "'b' is being moved" in await refused(driver.loading.pool("c"))
        assert "busy with 'b'" in await refused(driver.loading.evict("b"))
        await asyncio.sleep(1.0)
        assert driver.loading.moving is None
        assert "b" in disk.in_pool

    drive(disk, body)


def test_a_caller_that_leaves_does_not_stop_the_load() -> None:
    disk = Disk()

    async def body(driver: SlotDriver) -> None:
        command = asyncio.create_task(driver.loading.pool("b"))
        await asyncio.sleep(0.1)
        command.cancel()
        await asyncio.sleep(2.0)
        assert "b" in disk.in_pool

    drive(disk, body)


def test_closing_ends_commands() -> None:
    async def body(driver: SlotDriver) -> None:
        command = asyncio.create_task(driver.loading.pool("b"))
        await asyncio.sleep(0.1)
        await driver.aclose()
        with pytest.raises(HostUnavailable):
            await command
        for late in (driver.loading.pool("b"), driver.loading.evict("a")):
            with pytest.raises(HostUnavailable):
                await late

    drive(Disk(), body)


def test_a_host_without_a_pool_says_so() -> None:
    async def main() -> None:
        driver = SlotDriver(CONFIG, "ab", Disk(), clock=now_ms, resident="a")
        await driver.start()
        assert "keeps no weight pool" in await refused(driver.loading.pool("b"))
        await driver.aclose()

    run_virtual(main())


def test_work_counts_places_over_time_running_requests_included() -> None:
    meter = WorkMeter(places=4)
    meter.begin("a", 0.0)
    meter.begin("a", 100.0)
    assert meter.totals(200.0) == {"a": Work(2, (100 + 2 * 100) / 4)}
    meter.end("a", 300.0)
    meter.end("a", 400.0)
    meter.begin("b", 1_000.0)
    assert meter.totals(1_040.0) == {"a": Work(2, 150.0), "b": Work(1, 10.0)}


def test_the_driver_counts_what_it_grants() -> None:
    async def body(driver: SlotDriver) -> None:
        await asyncio.gather(use(driver, "a", 1.0), use(driver, "a", 1.0))
        assert driver.work()["a"] == Work(2, pytest.approx(1_000.0))
        await asyncio.sleep(1.0)
        assert driver.work()["a"].busy_ms == pytest.approx(1_000.0)

    drive(Disk(), body)
