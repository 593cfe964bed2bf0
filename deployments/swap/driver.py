"""The scheduler's hands: leases for requests, swaps for the actuator, a timer for the clock.

All state belongs to one event loop, which is its single writer. Each event and all its effects run
in one piece, without awaiting; so there is no lock, and no moment at which a request could act on a
state that has passed.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, assert_never

from deployments.swap.config import SchedulerConfig
from deployments.swap.core import Scheduler
from deployments.swap.effects import (
    AbortInFlight,
    BeginSwap,
    Effect,
    Grant,
    Refusal,
    Refuse,
    SlotSnapshot,
    WakeAt,
)
from deployments.swap.loading import Prefetcher, WeightLoading
from deployments.swap.work import Work, WorkMeter
from experts.errors import (
    CanaryMismatch,
    CoeError,
    DeadlineUnreachable,
    ExpertOutOfService,
    HostLost,
    HostUnavailable,
    QueueFull,
    SwapFailed,
    UnknownModel,
)

__all__ = ["Actuator", "Lease", "Prefetcher", "SlotDriver", "SlotScheduler", "SwapReport"]

_log = logging.getLogger(__name__)

_HUNG_TIMEOUTS = 5.0  # a swap that was to be stopped may still finish the read or write under way


@dataclass(frozen=True, slots=True)
class SwapReport:
    """What one swap took. ``bytes``: weights copied. The canary's time is not in ``copy_ms``, nor
    is ``turn_ms``, that of putting one engine to sleep and waking or starting another. ``way``:
    "in_place", "wake" or "start"."""

    expert: str
    copy_ms: float
    canary_ms: float
    bytes: int
    way: str = "in_place"
    turn_ms: float = 0.0


class Actuator(Protocol):
    """Whoever can put an expert's weights into the engine."""

    async def make_resident(self, expert: str) -> SwapReport:
        """Returns when the expert answers correctly from the slot.

        Called by one task at a time, and only while nothing runs in the engine. Raises
        ``SwapFailed`` or ``CanaryMismatch``. It may be cancelled (timeout, closing); it must not
        let go of a cancellation before the last write to the slot has ended, because the next swap
        may start at once.
        """
        ...


class SlotScheduler(Protocol):
    """Whoever decides for the slot: ``Scheduler``, or what a benchmark holds against it.

    Each event returns the effects it causes; ``Scheduler`` says what each means.
    """

    def arrive(
        self,
        request_id: str,
        expert: str,
        *,
        now_ms: float,
        priority: int = 0,
        deadline_ms: float | None = None,
    ) -> list[Effect]: ...

    def cancel(self, request_id: str, now_ms: float) -> list[Effect]: ...

    def first_token(self, request_id: str) -> bool: ...

    def has_sent(self, request_id: str) -> bool: ...

    def finish(self, request_id: str, now_ms: float) -> list[Effect]: ...

    def requeue(self, request_id: str, now_ms: float) -> list[Effect]: ...

    def swap_done(self, expert: str, now_ms: float, swap_ms: float) -> list[Effect]: ...

    def swap_failed(self, expert: str, reason: str, now_ms: float) -> list[Effect]: ...

    def tick(self, now_ms: float) -> list[Effect]: ...

    def announce(self, expert: str, now_ms: float) -> list[Effect]: ...

    def retire(self, expert: str, reason: str, now_ms: float) -> list[Effect]: ...

    def restore(self, expert: str, now_ms: float) -> list[Effect]: ...

    def expected_wait_ms(self, expert: str, now_ms: float, priority: int = 0) -> float: ...

    def snapshot(self) -> SlotSnapshot: ...

    def visible_state(self) -> tuple[object, ...]: ...

    def wanted(self) -> list[str]: ...


class Lease:
    """A request's right to run its expert. ``queue_ms`` + ``swap_ms`` is all it has waited:
    ``swap_ms`` is the part during which its own expert was being made resident.

    ``aborted`` is set when the slot wants to turn and this request has sent nothing yet: stop the
    generation, then either ``await requeue()`` to go on with a fresh grant, or leave by an error.
    """

    def __init__(self, driver: SlotDriver, expert: str, ticket: str) -> None:
        self.expert = expert
        self.queue_ms = 0.0
        self.swap_ms = 0.0
        self.aborted = asyncio.Event()
        self._driver = driver
        self._ticket = ticket

    def first_token(self) -> bool:
        """Call before the first token is sent: from then on no swap cuts the answer.

        False when the lease has been aborted; then nothing may be sent.
        """
        return self._driver._first_token(self)

    async def requeue(self) -> None:
        """Wait for another grant at the first arrival's place in line; the errors of ``lease``.

        The generation must have stopped on the device.
        """
        await self._driver._requeue(self)


@dataclass(slots=True, eq=False)
class _Ticket:
    """One request as the driver sees it. ``outcome`` is set once per wait: None means granted."""

    lease: Lease
    outcome: asyncio.Future[CoeError | None]
    since_ms: float
    granted: bool = False


class SlotDriver:
    """Runs one ``SlotScheduler`` (unless given, a ``Scheduler``) against one ``Actuator``.

    ``clock`` tells milliseconds and must advance with the event loop's time. ``on_change`` is
    called soon after the phase, the resident, the target or an expert's service changed; it takes
    no argument and may read ``snapshot()``. ``engines``: as for ``Scheduler``. ``prefetcher``
    loads what is waited for or announced and not in host memory; without one, swaps read the disk.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        experts: Sequence[str],
        actuator: Actuator,
        *,
        clock: Callable[[], float],
        resident: str | None = None,
        on_change: Callable[[], None] | None = None,
        scheduler: SlotScheduler | None = None,
        engines: Mapping[str, str] | None = None,
        prefetcher: Prefetcher | None = None,
    ) -> None:
        self.on_change = on_change
        self.last_swap: SwapReport | None = None
        self._config = config
        self._experts = tuple(experts)
        self._actuator = actuator
        self._clock = clock
        self._scheduler: SlotScheduler = scheduler or Scheduler(config, experts, resident, engines)
        self.loading = WeightLoading(
            self._scheduler,
            prefetcher,
            self._experts,
            pause_ms=config.prefetch_pause_ms,
            clock=clock,
            retire=self.retire,
        )
        self._work = WorkMeter(config.in_flight_max)
        self._tickets: dict[str, _Ticket] = {}
        self._numbers = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._swap_task: asyncio.Task[None] | None = None
        self._swap_expert: str | None = None
        self._swap_began_ms = 0.0
        self._swap_span_ms = (0.0, 0.0)  # when the newest swap began and ended
        self._shown = self._scheduler.visible_state()

    # --- life ------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Bind to the running event loop; leases are given from here on."""
        self._loop = asyncio.get_running_loop()

    async def aclose(self) -> None:
        """Refuse whoever waits, abort what has sent nothing, stop a running swap. Never hangs.

        Leases that have started to send stay valid until their holders leave them.
        """
        if self._closed:
            return
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for name, ticket in self._tickets.items():
            if not ticket.granted:
                self._resolve(ticket, HostUnavailable(ticket.lease.expert))
            elif not self._scheduler.has_sent(name):
                ticket.lease.aborted.set()
        await self.loading.aclose()
        await self._stop_swap()

    async def _stop_swap(self) -> None:
        if self._swap_task is None or self._swap_task.done():
            return
        self._swap_task.cancel()
        grace_s = self._config.close_grace_ms / 1000.0
        _, pending = await asyncio.wait({self._swap_task}, timeout=grace_s)
        if pending:
            _log.error("swap to %s does not stop; abandoned at close", self._swap_expert)

    # --- requests --------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(
        self,
        expert: str,
        *,
        request_id: str,
        priority: int = 0,
        queue_deadline_ms: float | None = None,
    ) -> AsyncIterator[Lease]:
        """Wait until ``expert`` is resident and has room; hold that until the context is left.

        Raises ``QueueFull``, ``DeadlineUnreachable``, ``ExpertOutOfService``, ``HostUnavailable``
        (closed) and ``UnknownModel``. Cancelling the wait withdraws the request. Whoever leaves the
        context, by whatever way, must have stopped the generation on the device.
        """
        self._refuse_if_unusable(expert)
        # A caller's id may repeat; the scheduler's must not.
        name = f"{request_id}#{next(self._numbers)}"
        lease = Lease(self, expert, name)
        ticket = self._tickets[name] = self._new_ticket(lease)
        try:
            self._step(
                self._scheduler.arrive(
                    name,
                    expert,
                    priority=priority,
                    deadline_ms=queue_deadline_ms,
                    now_ms=ticket.since_ms,
                )
            )
            await self._granted(ticket)
            yield lease
        except BaseException:
            self._leave(name, failed=True)
            raise
        else:
            self._leave(name, failed=False)

    def _refuse_if_unusable(self, expert: str) -> None:
        if self._loop is None:
            raise RuntimeError("start() the driver first")
        if self._closed:
            raise HostUnavailable(expert)
        if expert not in self._experts:
            raise UnknownModel(expert, self._experts)

    def _new_ticket(self, lease: Lease) -> _Ticket:
        return _Ticket(lease, asyncio.get_running_loop().create_future(), self._now_ms())

    async def _granted(self, ticket: _Ticket) -> None:
        error = await ticket.outcome
        if error is not None:
            raise error

    def _leave(self, name: str, *, failed: bool) -> None:
        """End a request. Without awaiting: a cancelled task gets no second chance to clean up."""
        ticket = self._tickets.pop(name)
        if ticket.granted:
            self._work.end(ticket.lease.expert, self._clock())
        if self._closed:
            return
        if failed or not ticket.granted:
            # Granted and cancelled in one turn of the loop is the same: the scheduler knows which.
            self._step(self._scheduler.cancel(name, self._now_ms()))
        else:
            self._step(self._scheduler.finish(name, self._now_ms()))

    def _first_token(self, lease: Lease) -> bool:
        if self._closed:
            return not lease.aborted.is_set()
        return self._scheduler.first_token(lease._ticket)

    async def _requeue(self, lease: Lease) -> None:
        if self._closed:
            raise HostUnavailable(lease.expert)
        lease.aborted.clear()
        self._work.end(lease.expert, self._clock())
        ticket = self._tickets[lease._ticket] = self._new_ticket(lease)
        self._step(self._scheduler.requeue(lease._ticket, ticket.since_ms))
        await self._granted(ticket)

    # --- residency -------------------------------------------------------------------------------

    def announce(self, expert: str) -> None:
        """A request for this expert is likely soon."""
        self._step(self._scheduler.announce(expert, self._now_ms()))

    def retire(self, expert: str, reason: str) -> None:
        """Take an expert out of service: its waiters get ``ExpertOutOfService``."""
        _log.warning("expert %s retired: %s", expert, reason)
        self._step(self._scheduler.retire(expert, reason, self._now_ms()))

    def restore(self, expert: str) -> None:
        """Put an expert back into service."""
        _log.info("expert %s restored", expert)
        self._step(self._scheduler.restore(expert, self._now_ms()))

    def expected_wait_ms(self, expert: str, priority: int = 0) -> float:
        """How long a request that came now would wait; infinite when out of service."""
        return self._scheduler.expected_wait_ms(expert, self._clock(), priority)

    def check_health(self) -> None:
        """Raise HostLost when a swap goes on long after it should have stopped: it cannot be, and
        until it ends the slot serves nobody."""
        if self._swap_task is None or self._swap_task.done():
            return
        if self._clock() - self._swap_began_ms > _HUNG_TIMEOUTS * self._config.swap_timeout_ms:
            raise HostLost(self._swap_expert or "", "")

    def snapshot(self) -> SlotSnapshot:
        return self._scheduler.snapshot()

    def work(self) -> Mapping[str, Work]:
        """Expert -> what the slot has done for it so far; none for those never granted."""
        return self._work.totals(self._clock())

    def _now_ms(self) -> float:
        """The time of an event. Only the owning loop may cause one."""
        if self._loop is not None and asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("the slot belongs to another event loop")
        return self._clock()

    # --- effects ---------------------------------------------------------------------------------

    def _step(self, effects: Sequence[Effect]) -> None:
        """Carry out what one event caused. ``effects`` come straight from the scheduler."""
        if self._closed:
            return
        for effect in effects:
            self._carry_out(effect)
        if self._loop is not None:
            self.loading.look_ahead()
        self._tell_change()

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Grant(name):
                self._grant(self._tickets[name])
            case Refuse(name):
                self._resolve(self._tickets[name], _error(effect))
            case BeginSwap(expert):
                self._begin_swap(expert)
            case AbortInFlight(names):
                for name in names:
                    self._tickets[name].lease.aborted.set()
            case WakeAt(at_ms):
                self._set_timer(at_ms)
            case _:
                assert_never(effect)

    def _grant(self, ticket: _Ticket) -> None:
        began_ms, ended_ms = self._swap_span_ms
        now_ms, lease = self._clock(), ticket.lease
        swap_ms = 0.0
        if self._swap_expert == lease.expert:
            swap_ms = max(0.0, ended_ms - max(began_ms, ticket.since_ms))
        lease.swap_ms += swap_ms
        lease.queue_ms += max(0.0, now_ms - ticket.since_ms - swap_ms)
        ticket.granted = True
        self._work.begin(lease.expert, now_ms)
        self._resolve(ticket, None)

    def _resolve(self, ticket: _Ticket, outcome: CoeError | None) -> None:
        if not ticket.outcome.done():  # a cancelled waiter withdraws when its task runs next
            ticket.outcome.set_result(outcome)

    def _set_timer(self, at_ms: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if at_ms is not None and self._loop is not None and not self._closed:
            delay_s = max(0.0, at_ms - self._clock()) / 1000.0
            self._timer = self._loop.call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._step(self._scheduler.tick(self._clock()))

    def _tell_change(self) -> None:
        state = self._scheduler.visible_state()
        if state == self._shown:
            return
        self._shown = state
        _log.info("slot is %s, resident %s, target %s", *state[:3])
        if self.on_change is not None and self._loop is not None:
            self._loop.call_soon(self.on_change)  # its failure must not break a request's path

    # --- swaps -----------------------------------------------------------------------------------

    def _begin_swap(self, expert: str) -> None:
        self._swap_expert = expert
        self._swap_began_ms = self._clock()
        self._swap_task = asyncio.get_running_loop().create_task(
            self._swap(expert), name=f"swap to {expert}"
        )

    async def _swap(self, expert: str) -> None:
        began_ms = self._clock()
        failure = await self._attempt(expert)
        ended_ms = self._clock()
        self._swap_span_ms = (began_ms, ended_ms)
        if self._closed:
            return
        if failure is None:
            self._step(self._scheduler.swap_done(expert, ended_ms, ended_ms - began_ms))
        else:
            _log.error("expert %s is out of service: %s", expert, failure)
            self._step(self._scheduler.swap_failed(expert, failure, ended_ms))

    async def _attempt(self, expert: str) -> str | None:
        """Run the actuator within its time; why it failed, or None."""
        limit_ms = self._config.swap_timeout_ms
        bound = asyncio.timeout(limit_ms / 1000.0)
        try:
            async with bound:
                self.last_swap = await self._actuator.make_resident(expert)
        except SwapFailed as error:
            return error.reason
        except CanaryMismatch as error:
            return error.message
        # The outermost frame of the swap task: whatever an engine throws must end as a failed swap,
        # or every waiter would hang.
        except Exception as error:  # noqa: BLE001
            if isinstance(error, TimeoutError) and bound.expired():
                return f"the swap took longer than {limit_ms:.0f} ms"
            _log.exception("swap to %s raised an unexpected error", expert)
            return f"unexpected {type(error).__name__}"
        return None


def _error(refusal: Refuse) -> CoeError:
    match refusal.reason:
        case Refusal.QUEUE_FULL:
            return QueueFull(refusal.expert, refusal.depth, refusal.wait_ms)
        case Refusal.DEADLINE:
            return DeadlineUnreachable(
                refusal.expert, refusal.wait_ms, refusal.limit_ms, refusal.retry_ms
            )
        case Refusal.OUT_OF_SERVICE:
            return ExpertOutOfService(refusal.expert, refusal.detail)
