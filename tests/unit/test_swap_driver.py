"""The asyncio driver under virtual time: leases, joined swaps, withdrawal, failure, closing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from deployments.swap.config import SchedulerConfig
from deployments.swap.driver import Lease, SlotDriver, SwapReport
from deployments.swap.states import SlotPhase
from experts.errors import (
    CanaryMismatch,
    DeadlineUnreachable,
    ExpertOutOfService,
    HostLost,
    HostUnavailable,
    QueueFull,
    SwapFailed,
    UnknownModel,
)
from tests.sim.virtual_time import now_ms, run_virtual


@dataclass
class PacedActuator:
    """Makes experts resident after a fixed time, and holds the driver to its contract."""

    swap_ms: float = 100.0
    failures: dict[str, BaseException] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    resident: str | None = None
    running: int = 0  # maintained by ``hold``
    busy: bool = False

    async def make_resident(self, expert: str) -> SwapReport:
        assert not self.busy, "two swaps at once"
        assert self.running == 0, "a swap under running requests"
        self.calls.append(expert)
        self.busy, self.resident = True, None
        try:
            await asyncio.sleep(self.swap_ms / 1000)
        finally:
            self.busy = False
        if expert in self.failures:
            raise self.failures[expert]
        self.resident = expert
        return SwapReport(expert, self.swap_ms, 0.0, 1)

    async def hold(self, lease: Lease, ms: float) -> None:
        assert self.resident == lease.expert, "granted while another expert is resident"
        self.running += 1
        try:
            await asyncio.sleep(ms / 1000)
        finally:
            self.running -= 1


CONFIG = SchedulerConfig(
    queue_max=4,
    in_flight_max=2,
    age_bound_ms=500,
    min_residency_ms=50,
    drain_deadline_ms=300,
    swap_timeout_ms=1_000,
    queue_wait_ms_max=120_000,
    close_grace_ms=50,
)
Body = Callable[[SlotDriver, PacedActuator], Awaitable[Any]]


def drive(body: Body, actuator: PacedActuator | None = None, **settings: Any) -> Any:
    """Run ``body`` against a started driver for experts a, b and c; close it afterwards."""
    actuator = actuator or PacedActuator()
    config = settings.pop("config", CONFIG)

    async def main() -> Any:
        driver = SlotDriver(config, ("a", "b", "c"), actuator, clock=now_ms, **settings)
        await driver.start()
        try:
            return await asyncio.wait_for(body(driver, actuator), 3_600)
        finally:
            await driver.aclose()

    return run_virtual(main())


async def use(driver: SlotDriver, actuator: PacedActuator, expert: str, ms: float) -> Lease:
    async with driver.lease(expert, request_id="r") as lease:
        assert lease.first_token()
        await actuator.hold(lease, ms)
    return lease


def test_all_waiters_join_one_swap_and_learn_what_they_waited_for() -> None:
    async def body(driver: SlotDriver, actuator: PacedActuator) -> list[Lease]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(use(driver, actuator, "a", 40)) for _ in range(3)]
        assert actuator.calls == ["a"]
        return [task.result() for task in tasks]

    leases = drive(body)
    waited = sorted((round(lease.queue_ms), round(lease.swap_ms)) for lease in leases)
    assert waited == [(0, 100), (0, 100), (40, 100)]


def test_the_resident_at_start_needs_no_swap() -> None:
    async def body(driver: SlotDriver, actuator: PacedActuator) -> None:
        lease = await use(driver, actuator, "b", 10)
        assert (lease.queue_ms, lease.swap_ms, actuator.calls) == (0.0, 0.0, [])

    drive(body, PacedActuator(resident="b"), resident="b")


def test_a_waiter_that_is_cancelled_leaves_nothing_behind() -> None:
    async def body(driver: SlotDriver, actuator: PacedActuator) -> None:
        busy = asyncio.create_task(use(driver, actuator, "a", 400))
        await asyncio.sleep(0.2)
        waiter = asyncio.create_task(use(driver, actuator, "b", 10))
        await asyncio.sleep(0.05)
        assert driver.snapshot().queued == {"b": 1}
        waiter.cancel()
        await asyncio.wait({waiter})
        assert driver.snapshot().queued == {}
        await busy
        await asyncio.sleep(5)
        assert actuator.calls == ["a"], "a swap for somebody who had left"

    drive(body)


def test_cancelling_in_the_very_turn_of_the_grant_gives_the_place_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body(driver: SlotDriver, actuator: PacedActuator) -> None:
        waiter = asyncio.create_task(use(driver, actuator, "a", 10))
        granting = driver._resolve

        def resolve_then_cancel(ticket: Any, outcome: Any) -> None:
            granting(ticket, outcome)
            waiter.cancel()  # granted, but its task has not run since

        monkeypatch.setattr(driver, "_resolve", resolve_then_cancel)
        await asyncio.wait({waiter})
        assert waiter.cancelled()
        assert (driver.snapshot().resident, driver.snapshot().in_flight) == ("a", 0)

    drive(body)


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (SwapFailed("a", "shard 3 is truncated"), "shard 3 is truncated"),
        (CanaryMismatch("a", 7, 9, -0.1, -2.0), "canary"),
        (ZeroDivisionError("engine broke"), "unexpected ZeroDivisionError"),
        (TimeoutError("the engine's own"), "unexpected TimeoutError"),
    ],
)
def test_a_failed_swap_takes_the_expert_out_and_serves_the_others(
    failure: BaseException, said: str
) -> None:
    async def body(driver: SlotDriver, actuator: PacedActuator) -> None:
        first = asyncio.create_task(use(driver, actuator, "a", 10))
        await asyncio.sleep(0.01)
        other = asyncio.create_task(use(driver, actuator, "b", 10))
        with pytest.raises(ExpertOutOfService, match=said):
            await first
        await other
        with pytest.raises(ExpertOutOfService, match=said):
            await use(driver, actuator, "a", 10)
        actuator.failures.clear()
        driver.restore("a")
        await use(driver, actuator, "a", 10)
        assert actuator.calls == ["a", "b", "a"]

    drive(body, PacedActuator(failures={"a": failure}))


def test_a_swap_that_takes_too_long_is_stopped() -> None:
    async def body(driver: SlotDriver, actuator: PacedActuator) -> None:
        with pytest.raises(ExpertOutOfService, match="longer than 1000 ms"):
            await use(driver, actuator, "a", 10)
        assert now_ms() == pytest.approx(1_000)
        assert not actuator.busy
        assert driver.snapshot().phase is SlotPhase.EMPTY

    drive(body, PacedActuator(swap_ms=60_000))


def test_a_swap_that_cannot_be_stopped_makes_the_host_unfit() -> None:
    """A device call that hangs lets go of nothing. Somebody has to replace the process."""

    class Hung(PacedActuator):
        async def make_resident(self, expert: str) -> SwapReport:
            writing = asyncio.ensure_future(asyncio.sleep(3_000))
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                await asyncio.wait({writing})
                raise
            raise AssertionError("stopped before")

    async def body(driver: SlotDriver, actuator: PacedActuator) -> None:
        waiter = asyncio.create_task(use(driver, actuator, "a", 10))
        await asyncio.sleep(4.9)
        driver.check_health()  # it was asked to stop, and may be about to
        await asyncio.sleep(0.2)
        with pytest.raises(HostLost):
            driver.check_health()
        waiter.cancel()

    drive(body, Hung())


def test_refusals_carry_the_measured_wait() -> None:
    async def body(driver: SlotDriver, actuator: PacedActuator) -> None:
        await use(driver, actuator, "b", 10)
        await use(driver, actuator, "a", 200)
        busy = [asyncio.create_task(use(driver, actuator, "a", 200)) for _ in range(6)]
        await asyncio.sleep(0.001)
        with pytest.raises(QueueFull) as full:
            await use(driver, actuator, "b", 10)
        assert full.value.depth == 4
        assert full.value.retry_after_ms > 100
        await asyncio.gather(*busy[:3])
        started_ms = now_ms()
        with pytest.raises(DeadlineUnreachable) as late:
            async with driver.lease("b", request_id="x", queue_deadline_ms=50):
                raise AssertionError("granted past its deadline")
        assert late.value.wait_ms > 50 == late.value.deadline_ms
        assert now_ms() == started_ms, "refused at once, not after waiting"
        await asyncio.gather(*busy)

    drive(body)


def test_a_deadline_that_passes_in_the_queue_ends_the_wait() -> None:
    async def body(driver: SlotDriver, actuator: PacedActuator) -> None:
        with pytest.raises(DeadlineUnreachable):  # nothing was measured yet, so it was let in
            async with driver.lease("a", request_id="x", queue_deadline_ms=30):
                raise AssertionError("granted past its deadline")
        assert now_ms() == pytest.approx(30, abs=1)

    drive(body)


def test_a_drain_aborts_what_has_sent_nothing_and_spares_what_has() -> None:
    async def silent(driver: SlotDriver, actuator: PacedActuator) -> float:
        async with driver.lease("a", request_id="silent") as lease:
            hold = asyncio.create_task(actuator.hold(lease, 60_000))
            await lease.aborted.wait()
            assert not lease.first_token(), "an aborted lease must not send"
            hold.cancel()
            await asyncio.wait({hold})
            await lease.requeue()
            assert lease.first_token()
            await actuator.hold(lease, 5)
            return lease.queue_ms

    async def body(driver: SlotDriver, actuator: PacedActuator) -> None:
        started = asyncio.create_task(use(driver, actuator, "a", 2_000))
        again = asyncio.create_task(silent(driver, actuator))
        await asyncio.sleep(0.2)
        other = asyncio.create_task(use(driver, actuator, "b", 10))
        lease = await other
        assert lease.queue_ms > 1_500, "the started answer ran to its end first"
        assert await again > 1_000
        await started
        assert actuator.calls == ["a", "b", "a"]

    drive(body)


def test_closing_ends_every_wait_and_never_hangs() -> None:
    async def body(driver: SlotDriver, actuator: PacedActuator) -> None:
        runner = asyncio.create_task(use(driver, actuator, "a", 500))
        await asyncio.sleep(0.2)
        waiters = [asyncio.create_task(use(driver, actuator, e, 10)) for e in ("b", "c", "b")]
        await asyncio.sleep(0.01)
        await driver.aclose()
        for waiter in waiters:
            with pytest.raises(HostUnavailable):
                await waiter
        with pytest.raises(HostUnavailable):
            await use(driver, actuator, "a", 10)
        await runner

    drive(body)


def test_closing_does_not_wait_for_an_actuator_that_ignores_cancellation() -> None:
    released = asyncio.Event()

    class Deaf(PacedActuator):
        async def make_resident(self, expert: str) -> SwapReport:
            while not released.is_set():
                try:
                    await released.wait()
                except asyncio.CancelledError:
                    continue
            return SwapReport(expert, 0.0, 0.0, 0)

    async def body(driver: SlotDriver, actuator: PacedActuator) -> None:
        waiter = asyncio.create_task(use(driver, actuator, "a", 10))
        await asyncio.sleep(0.01)
        await driver.aclose()
        assert now_ms() == pytest.approx(10 + CONFIG.close_grace_ms)
        with pytest.raises(HostUnavailable):
            await waiter
        released.set()

    drive(body, Deaf())


def test_changes_are_told_once_each() -> None:
    seen: list[tuple[SlotPhase, str | None]] = []

    async def body(driver: SlotDriver, actuator: PacedActuator) -> None:
        def note() -> None:
            shown = driver.snapshot()
            seen.append((shown.phase, shown.resident))

        driver.on_change = note
        await use(driver, actuator, "a", 10)
        driver.retire("a", "operator")
        await asyncio.sleep(0.01)
        assert dict(driver.snapshot().out_of_service) == {"a": "operator"}

    drive(body)
    assert seen == [(SlotPhase.SWAPPING, None), (SlotPhase.SERVING, "a"), (SlotPhase.EMPTY, None)]


def test_an_expert_that_is_not_here_is_named_with_those_that_are() -> None:
    async def body(driver: SlotDriver, actuator: PacedActuator) -> None:
        with pytest.raises(UnknownModel, match="a, b, c"):
            await use(driver, actuator, "z", 10)

    drive(body)


def test_events_from_another_thread_are_refused() -> None:
    async def body(driver: SlotDriver, actuator: PacedActuator) -> None:
        loop = asyncio.get_running_loop()
        with pytest.raises(RuntimeError, match="no running event loop"):
            await loop.run_in_executor(None, driver.retire, "a", "from a thread")

    actuator = PacedActuator()

    async def main() -> None:  # a real loop: threads do not belong under virtual time
        driver = SlotDriver(CONFIG, ("a",), actuator, clock=now_ms)
        await driver.start()
        await body(driver, actuator)
        assert not driver.snapshot().out_of_service
        await driver.aclose()

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(20))
def test_a_crowd_with_cancels_and_failures_always_comes_to_rest(seed: int) -> None:
    rng = random.Random(seed)
    ended: list[str] = []

    async def client(driver: SlotDriver, actuator: PacedActuator, number: int) -> None:
        await asyncio.sleep(rng.uniform(0, 20))
        try:
            async with driver.lease(rng.choice("abc"), request_id=f"{number % 7}") as lease:
                assert lease.first_token()
                await actuator.hold(lease, rng.uniform(1, 600))
            ended.append("served")
        except (QueueFull, DeadlineUnreachable, ExpertOutOfService) as error:
            ended.append(type(error).__name__)

    async def body(driver: SlotDriver, actuator: PacedActuator) -> None:
        tasks = [asyncio.create_task(client(driver, actuator, n)) for n in range(80)]
        leavers = rng.sample(tasks, 20)
        for task in leavers:
            await asyncio.sleep(rng.uniform(0, 1))
            task.cancel()
            if rng.random() < 0.2:
                driver.retire("b", "test")
                driver.restore("b")
        results = await asyncio.gather(*tasks, return_exceptions=True)
        strange = [r for r in results if r and not isinstance(r, asyncio.CancelledError)]
        assert strange == []
        shown = driver.snapshot()
        assert (shown.in_flight, dict(shown.queued), actuator.running) == (0, {}, 0)

    drive(body, PacedActuator(swap_ms=rng.uniform(5, 200)))
    assert ended.count("served") > 5
