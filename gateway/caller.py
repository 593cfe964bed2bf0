"""Calls one expert for one stage: by which host, how often, and which failures may move on."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from msgspec import structs

from deployments.choose_host import MOVES_MAX
from experts.errors import (
    CapacityError,
    CoeError,
    ConnectionPoolFull,
    DeadlineUnreachable,
    ExpertError,
    ExpertFailed,
    ExpertOutOfService,
    HostLost,
    HostUnavailable,
    QueueFull,
    StateUnavailable,
    SwapFailed,
    UpstreamTimeout,
)
from experts.protocol import ExpertCall, ExpertReply, ExpertStream
from experts.types import ExpertSpec, SourceKind
from gateway.backends import Lease
from gateway.breakers import expert_target, faults, host_target
from gateway.journal import StageNote
from gateway.retries import RetryBudget, RetryRules, is_transient
from gateway.state.breakers import BreakerBoard, Passage
from gateway.waiting_calls import MovedElsewhere

__all__ = [
    "Caller",
    "Leases",
    "OpenStage",
    "may_fail_over",
]

_HOSTS_PER_STAGE_MAX = 3
_REQUEST_AT_FAULT = frozenset({400, 413, 422})
_ELSEWHERE = (
    HostLost,
    HostUnavailable,
    QueueFull,
    ConnectionPoolFull,
    DeadlineUnreachable,
    ExpertOutOfService,
    SwapFailed,
)


class Leases(Protocol):
    """Hands out backends; ``gateway.backends.BackendPool`` is one."""

    def lease(self, spec: ExpertSpec, *, exclude: Iterable[str] = ()) -> Lease: ...

    def suspect(self, host: str) -> None: ...


@runtime_checkable
class Batched(Protocol):
    """A stream that can also hand out its payloads in the groups the network delivered."""

    def batches(self) -> AsyncIterator[list[bytes]]: ...


@dataclass(slots=True)
class OpenStage:
    """A stream that has begun: close ``stack`` to end the generation."""

    stream: ExpertStream
    stack: AsyncExitStack
    passage: Passage
    host: str = ""

    def batches(self) -> AsyncIterator[list[bytes]]:
        return self.stream.batches() if isinstance(self.stream, Batched) else _singly(self.stream)


async def _singly(stream: ExpertStream) -> AsyncIterator[list[bytes]]:
    async for payload in stream:
        yield [payload]


def may_fail_over(error: CoeError) -> bool:
    """Whether the next stage may try: not when the expert says that the request is at fault."""
    if isinstance(error, ExpertFailed):
        return error.status not in _REQUEST_AT_FAULT
    return isinstance(error, ExpertError | CapacityError) and not isinstance(
        error, StateUnavailable
    )


async def _sleep_ms(pause_ms: float) -> None:
    await asyncio.sleep(pause_ms / 1000.0)


class Caller:
    """Calls an expert; goes on to another of its hosts, or tries again, while nothing was received.

    ``now_ms``, ``random01`` and ``sleep_ms`` are the clock, the dice and the patience of retries.
    """

    def __init__(
        self,
        leases: Leases,
        *,
        breakers: BreakerBoard | None = None,
        retries: RetryRules | None = None,
        now_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
        random01: Callable[[], float] = random.random,
        sleep_ms: Callable[[float], Awaitable[None]] = _sleep_ms,
    ) -> None:
        self.leases = leases
        self.breakers = BreakerBoard(now_ms=now_ms) if breakers is None else breakers
        self.rules = retries or RetryRules()
        self.budget = RetryBudget(self.rules, now_ms())
        self.now_ms = now_ms
        self.random01 = random01
        self.sleep_ms = sleep_ms

    def broke(self, stage: OpenStage, spec: ExpertSpec, error: CoeError) -> None:
        """A stream failed after it had begun."""
        stage.passage.failed(faults(error, spec.id, stage.host, short_of_time=True))
        if isinstance(error, HostLost) and stage.host:
            self.leases.suspect(stage.host)

    async def complete(
        self, spec: ExpertSpec, call: ExpertCall, note: StageNote, *, short_of_time: bool = False
    ) -> ExpertReply:
        """Raises the last error when neither another host nor a retry is left."""
        tries = _Tries(self, spec, call, note, short_of_time)
        while True:
            lease, passage = await tries.next()
            try:
                with tries.until_moved(lease):
                    reply = await lease.backend.complete(tries.call_now())
            except MovedElsewhere:
                tries.moved(lease, passage)
            except CoeError as error:
                await tries.failed(lease, passage, error)
            except BaseException:
                passage.abandoned()
                raise
            else:
                passage.succeeded()
                note.took(reply.timings)
                note.queue_ms += tries.waited_elsewhere_ms
                return reply

    async def open(
        self, spec: ExpertSpec, call: ExpertCall, note: StageNote, *, short_of_time: bool = False
    ) -> tuple[OpenStage, AsyncIterator[list[bytes]], list[bytes]]:
        """An open stream, its iterator, and its first batch, already read.

        A stream counts as open when its first event is there: until then another host can take
        over without anybody noticing.
        """
        tries = _Tries(self, spec, call, note, short_of_time)
        while True:
            lease, passage = await tries.next()
            stack = AsyncExitStack()
            try:
                with tries.until_moved(lease):
                    stream = await stack.enter_async_context(lease.backend.stream(tries.call_now()))
                    opened = OpenStage(stream, stack, passage, lease.host)
                    batches = opened.batches()
                    first = await _first_batch(batches, spec)
            except MovedElsewhere:
                await stack.aclose()
                tries.moved(lease, passage)
            except CoeError as error:
                await stack.aclose()
                await tries.failed(lease, passage, error)
            except BaseException:
                passage.abandoned()
                await stack.aclose()
                raise
            else:
                passage.answered()
                note.took(stream.timings)
                note.queue_ms += tries.waited_elsewhere_ms
                return opened, batches, first


async def _first_batch(batches: AsyncIterator[list[bytes]], spec: ExpertSpec) -> list[bytes]:
    async for batch in batches:
        return batch
    raise ExpertFailed(spec.id, 502, "an empty stream")


class _Tries:
    """The calls that one stage makes of its expert.

    Each host once, at most ``_HOSTS_PER_STAGE_MAX``: that costs no pause, since it is another
    machine. Where there is only one, it is asked again after a pause, if the error is transient and
    the rules and the budget of retries allow. All within the time of the one call asked for.

    A call that waits at a busy host may move to an idle one, ``MOVES_MAX`` times. That is no
    failure: the host that it leaves counts as not tried, and is asked again if no other is left.
    """

    def __init__(
        self,
        caller: Caller,
        spec: ExpertSpec,
        call: ExpertCall,
        note: StageNote,
        short_of_time: bool,
    ) -> None:
        self._caller = caller
        self._spec = spec
        self._call = call
        self._note = note
        self._short_of_time = short_of_time
        self._began_ms = caller.now_ms()
        self._tried: set[str] = set()
        self._left: list[str] = []  # hosts that it moved away from
        self._sent_ms = self._began_ms
        self.waited_elsewhere_ms = 0.0
        self._retries = 0
        self._last: CoeError | None = None
        caller.budget.note_request(self._began_ms)

    def call_now(self) -> ExpertCall:
        """The call, with what is left of its time."""
        self._sent_ms = self._caller.now_ms()
        if self._last is None and not self._left:
            return self._call
        call, left_ms = self._call, self._left_ms()
        return structs.replace(
            call,
            timeout_ms=left_ms,
            first_token_timeout_ms=min(call.first_token_timeout_ms, left_ms),
            queue_deadline_ms=min(call.queue_deadline_ms or left_ms, left_ms),
        )

    async def next(self) -> tuple[Lease, Passage]:
        """Whom to call now. Raises the last error, or HostUnavailable when there was none."""
        while True:
            lease = self._lease()
            passage = await self._caller.breakers.enter(self._targets(lease))
            if isinstance(passage, Passage):
                return lease, passage
            if lease.host and passage == host_target(lease.host):
                self._tried.add(lease.host)
                continue
            wait_ms = max(1, self._caller.breakers.wait_ms(passage))
            reason = "its circuit breaker is open after failures"
            raise self._last or HostUnavailable(self._spec.id, wait_ms, reason)

    def until_moved(self, lease: Lease) -> AbstractContextManager[None]:
        """The context to await the answer's beginning in."""
        return lease.until_moved() if len(self._left) < MOVES_MAX else nullcontext()

    def moved(self, lease: Lease, passage: Passage) -> None:
        """The call was taken back; ``next`` is asked for another host."""
        passage.abandoned()
        self.waited_elsewhere_ms += self._caller.now_ms() - self._sent_ms
        self._left.append(lease.host)
        self._note.moves = len(self._left)

    async def failed(self, lease: Lease, passage: Passage, error: CoeError) -> None:
        """Note the failure; raises it when neither another host nor a retry is left."""
        to_blame = faults(error, self._spec.id, lease.host, short_of_time=self._short_of_time)
        passage.failed(to_blame)
        broke = isinstance(error, HostLost) or (
            isinstance(error, UpstreamTimeout) and error.phase == "connect"
        )
        if broke and lease.host:
            self._caller.leases.suspect(lease.host)
        self._tried.add(lease.host)
        self._last = error
        elsewhere = broke or isinstance(error, _ELSEWHERE)
        hosted = self._spec.kind is SourceKind.WEIGHTS and bool(lease.host)
        if elsewhere and hosted and len(self._tried) < _HOSTS_PER_STAGE_MAX:
            return
        await self._wait_for_retry(error)

    async def _wait_for_retry(self, error: CoeError) -> None:
        """Returns when a retry may start; raises the error when there will be none."""
        caller = self._caller
        if not is_transient(error) or len(self._tried) > 1:  # several machines said the same
            raise error
        pause = caller.rules.pause_ms(self._retries, caller.random01(), self._left_ms())
        if pause is None or not caller.budget.take(caller.now_ms()):
            raise error
        self._retries += 1
        self._note.retries = self._retries
        self._tried.clear()
        await caller.sleep_ms(pause)

    def _lease(self) -> Lease:
        leases = self._caller.leases
        if self._left:
            with suppress(HostUnavailable):
                return leases.lease(self._spec, exclude={*self._tried, self._left[-1]})
        try:
            return leases.lease(self._spec, exclude=self._tried)
        except HostUnavailable:
            if self._last is not None:
                raise self._last from None
            raise

    def _targets(self, lease: Lease) -> tuple[str, ...]:
        expert = expert_target(self._spec.id)
        return (expert, host_target(lease.host)) if lease.host else (expert,)

    def _left_ms(self) -> float:
        return max(1.0, self._call.timeout_ms - (self._caller.now_ms() - self._began_ms))
