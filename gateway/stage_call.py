"""One call of one expert within a plan: what is sent, to which host, which failures may move on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from experts.errors import (
    CapacityError,
    CoeError,
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
from experts.types import Endpoint, ExpertSpec, SourceKind
from gateway.backends import Lease
from gateway.journal import Decision, StageNote
from gateway.wire import WireRequest
from policies.types import Attempt

__all__ = ["Caller", "Leases", "OpenStage", "Timeouts", "may_fail_over", "stage_call"]

_HOSTS_PER_STAGE_MAX = 3
_REQUEST_AT_FAULT = frozenset({400, 413, 422})
_ELSEWHERE = (
    HostLost,
    HostUnavailable,
    QueueFull,
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


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Bounds of one call, in milliseconds."""

    total_ms: float
    first_token_ms: float
    idle_ms: float


@dataclass(slots=True)
class OpenStage:
    """A stream that has begun: close ``stack`` to end the generation."""

    stream: ExpertStream
    stack: AsyncExitStack

    def batches(self) -> AsyncIterator[list[bytes]]:
        return self.stream.batches() if isinstance(self.stream, Batched) else _singly(self.stream)


async def _singly(stream: ExpertStream) -> AsyncIterator[list[bytes]]:
    async for payload in stream:
        yield [payload]


def stage_call(
    request: WireRequest,
    decision: Decision,
    attempt: Attempt,
    *,
    request_id: str,
    timeouts: Timeouts,
) -> ExpertCall:
    """The call of a stage. Adds what judging and exact accounting need to the caller's body."""
    total_ms = min(attempt.timeout_ms, timeouts.total_ms)
    first_ms = min(timeouts.first_token_ms, total_ms)
    return ExpertCall(
        expert=attempt.stage.expert,
        endpoint=request.endpoint,
        body=_stage_body(request, decision, judged=is_judged(attempt)),
        request_id=request_id,
        timeout_ms=total_ms,
        first_token_timeout_ms=first_ms if request.stream else total_ms,
        idle_timeout_ms=timeouts.idle_ms,
        queue_deadline_ms=first_ms,
    )


def is_judged(attempt: Attempt) -> bool:
    return attempt.stage.accept is not None and not attempt.is_last


def _stage_body(request: WireRequest, decision: Decision, *, judged: bool) -> dict[str, Any]:
    body = dict(request.body)
    if request.max_output_tokens is None:
        # Without a bound upstream, the reserved worst case would bound nothing.
        body["max_tokens"] = decision.max_output_tokens
    if request.stream:
        body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    if judged and not request.wants_logprobs:
        # 1, because some servers read 0 as "none".
        body["logprobs"] = True if request.endpoint is Endpoint.CHAT else 1
    return body


def may_fail_over(error: CoeError) -> bool:
    """Whether the next stage may try: not when the expert says that the request is at fault."""
    if isinstance(error, ExpertFailed):
        return error.status not in _REQUEST_AT_FAULT
    return isinstance(error, ExpertError | CapacityError) and not isinstance(
        error, StateUnavailable
    )


class Caller:
    """Calls an expert; goes on to another of its hosts while no token was received."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases

    def lost(self, host: str) -> None:
        """A host broke after its stream had begun."""
        if host:
            self._leases.suspect(host)

    async def complete(self, spec: ExpertSpec, call: ExpertCall, note: StageNote) -> ExpertReply:
        """Raises the last host's error when no host is left."""
        hosts = _Hosts(self._leases, spec)
        while True:
            lease = hosts.next()
            try:
                reply = await lease.backend.complete(call)
            except CoeError as error:
                hosts.failed(lease, error)
            else:
                note.took(reply.timings)
                return reply

    async def open(
        self, spec: ExpertSpec, call: ExpertCall, note: StageNote
    ) -> tuple[OpenStage, AsyncIterator[list[bytes]], list[bytes]]:
        """An open stream, its iterator, and its first batch, already read.

        A stream counts as open when its first event is there: until then another host can take
        over without anybody noticing.
        """
        hosts = _Hosts(self._leases, spec)
        while True:
            lease = hosts.next()
            stack = AsyncExitStack()
            try:
                stream = await stack.enter_async_context(lease.backend.stream(call))
                opened = OpenStage(stream, stack)
                batches = opened.batches()
                first = await _first_batch(batches, spec)
            except CoeError as error:
                await stack.aclose()
                hosts.failed(lease, error)
            except BaseException:
                await stack.aclose()
                raise
            else:
                note.took(stream.timings)
                return opened, batches, first


async def _first_batch(batches: AsyncIterator[list[bytes]], spec: ExpertSpec) -> list[bytes]:
    async for batch in batches:
        return batch
    raise ExpertFailed(spec.id, 502, "an empty stream")


class _Hosts:
    """The hosts of an expert, each tried once, at most ``_HOSTS_PER_STAGE_MAX``."""

    def __init__(self, leases: Leases, spec: ExpertSpec) -> None:
        self._leases = leases
        self._spec = spec
        self._tried: set[str] = set()
        self._last: CoeError | None = None

    def next(self) -> Lease:
        try:
            return self._leases.lease(self._spec, exclude=self._tried)
        except HostUnavailable:
            if self._last is not None:
                raise self._last from None
            raise

    def failed(self, lease: Lease, error: CoeError) -> None:
        """Note the failure; raises it when another host would not help."""
        broke = isinstance(error, HostLost) or (
            isinstance(error, UpstreamTimeout) and error.phase == "connect"
        )
        if broke and lease.host:
            self._leases.suspect(lease.host)
        self._tried.add(lease.host)
        self._last = error
        elsewhere = broke or isinstance(error, _ELSEWHERE)
        hosted = self._spec.kind is SourceKind.WEIGHTS and bool(lease.host)
        if not (elsewhere and hosted) or len(self._tried) >= _HOSTS_PER_STAGE_MAX:
            raise error
