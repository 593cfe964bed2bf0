"""Loading ahead: what is chosen, and that the driver has it done beside what runs."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from deployments.swap.core import Scheduler, SchedulerConfig
from deployments.swap.driver import SlotDriver, SwapReport
from deployments.swap.prefetch import Prefetch, next_prefetch
from experts.errors import SwapFailed
from tests.sim.virtual_time import now_ms, run_virtual

CONFIG = SchedulerConfig(in_flight_max=1, min_residency_ms=1_000, age_bound_ms=5_000)


def test_the_most_wanted_that_is_missing_and_never_at_the_cost_of_who_is_wanted_more() -> None:
    assert next_prefetch(["b", "c", "d"], {"a", "b"}, ["a"]) == Prefetch("c", ("a", "b"))
    assert next_prefetch(["b", "c"], {"a"}, ["a", "b"], "b") == Prefetch("c", ("a", "b"))
    assert next_prefetch(["b", "c"], {"a"}, ["a", "b"]) == Prefetch("b", ("a", "b"))
    assert next_prefetch(["b"], {"a", "b"}, ["a"]) is None
    assert next_prefetch([], set(), []) is None


def test_wanted_counts_waiting_and_announced_but_not_who_is_out_of_service() -> None:
    scheduler = Scheduler(CONFIG, "abcd", "a")
    for number in range(3):
        scheduler.arrive(f"a{number}", "a", now_ms=0)
    scheduler.arrive("b1", "b", now_ms=0)
    scheduler.announce("c", 0)
    scheduler.announce("d", 0)
    scheduler.retire("d", "operator", 0)
    assert scheduler.wanted() == ["a", "b", "c"]


class Disk:
    """A pool without b and c, from a disk that takes a second; ``bad`` experts cannot be read."""

    def __init__(self, bad: str = "") -> None:
        self.in_pool = {"a"}
        self.loads: list[tuple[str, tuple[str, ...]]] = []
        self.swaps: list[tuple[str, bool]] = []
        self.bad = bad

    async def prefetch(self, expert: str, keep: Sequence[str]) -> bool:
        self.loads.append((expert, tuple(keep)))
        await asyncio.sleep(1.0)
        if expert in self.bad:
            raise SwapFailed(expert, "cut short")
        self.in_pool.add(expert)
        return True

    async def make_resident(self, expert: str) -> SwapReport:
        self.swaps.append((expert, expert in self.in_pool))
        await asyncio.sleep(0.05 if expert in self.in_pool else 1.0)
        self.in_pool.add(expert)
        return SwapReport(expert, 50.0, 0.0, 1)


def play(disk: Disk) -> SlotDriver:
    """Expert a runs for two seconds; b is asked for and c announced meanwhile."""

    async def main() -> SlotDriver:
        driver = SlotDriver(CONFIG, "abc", disk, clock=now_ms, resident="a", prefetcher=disk)
        await driver.start()

        async def use(expert: str, seconds: float) -> None:
            async with driver.lease(expert, request_id=expert):
                await asyncio.sleep(seconds)

        first = asyncio.create_task(use("a", 2.0))
        await asyncio.sleep(0.1)
        second = asyncio.create_task(use("b", 0.1))
        await asyncio.sleep(0.1)
        driver.announce("c")
        await asyncio.gather(first, second, return_exceptions=True)
        await asyncio.sleep(2.0)
        await driver.aclose()
        return driver

    return run_virtual(main())


def test_the_next_experts_are_loaded_while_the_resident_runs() -> None:
    disk = Disk()
    play(disk)
    assert [expert for expert, _ in disk.loads] == ["b", "c"]
    assert "a" in disk.loads[0][1]
    assert disk.swaps == [("b", True)], "the swap found the weights in host memory"


def test_weights_that_cannot_be_loaded_are_out_of_service_before_their_turn() -> None:
    disk = Disk(bad="b")
    driver = play(disk)
    assert dict(driver.snapshot().out_of_service) == {"b": "cut short"}
    assert disk.swaps == []
