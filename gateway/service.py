"""The serving use case: one request in, one answer out, everything about it written down.

Knows neither FastAPI nor Redis nor Ray: what it needs of them comes in as protocols.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from experts.catalogue import Catalogue
from experts.errors import CoeError
from experts.types import ExpertSpec
from gateway.access import Gate, OpenGate
from gateway.caller import Caller, Leases
from gateway.dearest import dearest_cost_micro_usd, dearest_prices
from gateway.decide import Decider, LiveState
from gateway.journal import CURRENT, Journal, decision_record, explanation
from gateway.keys import Access
from gateway.language import language_detector
from gateway.plan_run import OpenAnswer, PlanRun
from gateway.retries import RetryRules
from gateway.stage_call import Timeouts
from gateway.state.breakers import BreakerBoard
from gateway.steering import Steering
from gateway.wire import WireRequest
from policies.live import PolicySet
from routers.types import QueryRouter

__all__ = ["Clock", "Experts", "GatewayService", "RecordSink", "ServiceLimits", "build_service"]


class Experts(LiveState, Leases, Protocol):
    """Live state and backends in one; ``gateway.backends.BackendPool`` is one."""


class RecordSink(Protocol):
    """Takes decision records without waiting; ``gateway.state.decisions.DecisionLog`` is one."""

    def append(self, record: dict[str, Any], /) -> None: ...


@dataclass(frozen=True, slots=True)
class Clock:
    """Monotonic milliseconds for durations, wall-clock milliseconds for records."""

    now_ms: Callable[[], float]
    wall_ms: Callable[[], int]


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Bounds that hold for every request, whatever its policy says."""

    prompt_chars: int = 400_000
    request_timeout_ms: float = 120_000.0
    first_token_timeout_ms: float = 60_000.0
    idle_timeout_ms: float = 30_000.0


class GatewayService:
    """Decides, runs the plan, keeps the journal. Safe for any number of requests at once."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        decider: Decider,
        caller: Caller,
        timeouts: Timeouts,
        clock: Clock,
        new_id: Callable[[], str],
        gate: Gate,
        records: RecordSink | None,
        observers: Sequence[Callable[[Journal], None]],
        begin_trace: Callable[[Journal], None] | None,
    ) -> None:
        self._gate = gate
        self._begin_trace = begin_trace
        self._dearest = dearest_prices(spec.price for spec in catalogue.specs)
        self._catalogue = catalogue
        self._decider = decider
        self._caller = caller
        self._timeouts = timeouts
        self._clock = clock
        self._new_id = new_id
        self._records = records
        self._observers = tuple(observers)

    def journal(self, endpoint: str, request_id: str) -> AbstractContextManager[Journal]:
        """A request's journal; closed, recorded and shown to the observers on every way out."""
        journal = Journal(
            request_id=request_id,
            decision_id=self._new_id(),
            endpoint=endpoint,
            arrived_ms=self._clock.now_ms(),
            wall_ms=self._clock.wall_ms(),
        )
        return _OpenJournal(journal, self._begin_trace, self._close)

    async def authenticate(self, secret: str | None) -> Access:
        """Who asks, by the secret that was sent. Raises AuthenticationFailed."""
        return await self._gate.authenticate(secret)

    async def settle(self, journal: Journal) -> None:
        """Charge the request's key. To be called when all is spent, before the last byte is sent.

        A request that ends any other way is settled when its journal closes.
        """
        await self._gate.settle(journal)

    async def complete(self, request: WireRequest, journal: Journal) -> dict[str, Any]:
        """A whole answer's body. Cancelling it cancels the generation. Raises CoeError."""
        run = await self._started(request, journal)
        return await run.complete()

    @asynccontextmanager
    async def stream(self, request: WireRequest, journal: Journal) -> AsyncIterator[OpenAnswer]:
        """An answer that may be sent. Leaving early aborts the generation. Raises CoeError."""
        run = await self._started(request, journal)
        answer = await run.open()
        try:
            yield answer
        except CoeError as error:
            await answer.abort("failed", error)
            raise
        except BaseException:
            await answer.abort("aborted", None)
            raise
        else:
            await answer.aclose()

    async def explain(self, request: WireRequest, journal: Journal) -> dict[str, Any]:
        """The decision a request would get, by the code that serves it. Calls no expert."""
        journal.request = request
        journal.decision = decision = await self._decider.decide(request, journal)
        view = explanation(journal)
        return view | {"excluded": self._decider.off_route(decision) | view["excluded"]}

    async def count_tokens(self, request: WireRequest, journal: Journal) -> int:
        """How many tokens the prompt has. Calls no expert. Raises CoeError."""
        return await self._decider.count_tokens(request, journal.access)

    def model_names(self, access: Access) -> tuple[str, ...]:
        """Everything ``model`` may say for this caller, in the order in which to list it.

        Raises StateUnavailable for a key that cannot be looked up.
        """
        self._decider.check_listing(access)
        return self._decider.model_names(access.scope)

    def expert(self, name: str) -> ExpertSpec | None:
        return self._catalogue.get(name) if name in self._catalogue else None

    async def _started(self, request: WireRequest, journal: Journal) -> PlanRun:
        journal.request = request
        journal.decision = decision = await self._decider.decide(request, journal)
        journal.decided_ms = self._clock.now_ms()
        await self._gate.admit(journal, request, decision)
        return PlanRun(
            request=request,
            decision=decision,
            journal=journal,
            caller=self._caller,
            timeouts=self._timeouts,
            now_ms=self._clock.now_ms,
        )

    def _close(self, journal: Journal) -> None:
        journal.ended_ms = self._clock.now_ms()
        if journal.served is not None:
            usage = journal.served.usage
            journal.dearest_micro_usd = dearest_cost_micro_usd(self._dearest, usage)
        self._gate.close(journal)
        if self._records is not None and journal.request is not None:
            self._records.append(decision_record(journal))
        for observe in self._observers:
            observe(journal)


class _OpenJournal:
    """A journal while its request runs: how that ends is its outcome."""

    __slots__ = ("_begin_trace", "_close", "_journal")

    def __init__(
        self,
        journal: Journal,
        begin_trace: Callable[[Journal], None] | None,
        close: Callable[[Journal], None],
    ) -> None:
        self._journal = journal
        self._begin_trace = begin_trace
        self._close = close

    def __enter__(self) -> Journal:
        # Each request has a task of its own, so nothing has to be put back.
        CURRENT.set(self._journal)
        if self._begin_trace is not None:
            self._begin_trace(self._journal)
        return self._journal

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        journal = self._journal
        if isinstance(error, CoeError):
            journal.outcome, journal.error = "error", error
        elif isinstance(error, asyncio.CancelledError | GeneratorExit):
            journal.outcome = "client_closed"
        else:
            # A stream that failed in mid-air has noted its error already.
            journal.outcome = journal.outcome or ("ok" if error is None else "error")
        self._close(journal)


def build_service(
    *,
    catalogue: Catalogue,
    policies: Callable[[], PolicySet],
    router: QueryRouter | None,
    experts: Experts,
    limits: ServiceLimits,
    clock: Clock,
    new_id: Callable[[], str],
    gate: Gate | None = None,
    records: RecordSink | None = None,
    observers: Sequence[Callable[[Journal], None]] = (),
    begin_trace: Callable[[Journal], None] | None = None,
    state_available: Callable[[], bool] = lambda: True,
    breakers: BreakerBoard | None = None,
    retries: RetryRules | None = None,
    steering: Steering | None = None,
) -> GatewayService:
    """Put the use case together. The arguments stay the caller's to close.

    ``gate`` None: no keys, everybody may ask. ``breakers`` None: some of this service's own.
    """
    return GatewayService(
        catalogue=catalogue,
        decider=Decider(
            catalogue=catalogue,
            policies=policies,
            router=router,
            live=experts,
            now_ms=clock.now_ms,
            prompt_chars_max=limits.prompt_chars,
            state_available=state_available,
            steering=steering,
            language_of=language_detector(catalogue.specs),
        ),
        caller=Caller(experts, breakers=breakers, retries=retries, now_ms=clock.now_ms),
        timeouts=Timeouts(
            total_ms=limits.request_timeout_ms,
            first_token_ms=limits.first_token_timeout_ms,
            idle_ms=limits.idle_timeout_ms,
        ),
        clock=clock,
        new_id=new_id,
        gate=gate or OpenGate(),
        records=records,
        observers=observers,
        begin_trace=begin_trace,
    )
