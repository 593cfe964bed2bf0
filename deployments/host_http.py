"""The expert host's own HTTP port: the data plane between gateway and engine.

Speaks OpenAI's completions and chat completions for the experts of one slot. A request waits here,
in the slot's queue, until its expert is resident; it never waits inside a paused engine. What the
wait was is in the response headers, so the status line and headers go out with the first token.

Every path but ``/health`` needs the token that host and gateway share.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deployments.host_placement import PLACEMENT_PATH, PlacementCommands
from deployments.host_tracing import HostSpans
from deployments.swap.driver import Lease, SlotDriver
from experts.errors import (
    AuthenticationFailed,
    BodyTooLarge,
    CoeError,
    DeadlineUnreachable,
    ExpertFailed,
    ExpertOutOfService,
    HostLost,
    HostUnavailable,
    InvalidRequest,
    PlacementRefused,
    QueueFull,
    UnknownModel,
)
from experts.event_stream import SseDecoder
from experts.tracing import operation
from experts.types import Endpoint
from experts.upstream_errors import error_from_event

log = logging.getLogger(__name__)

T = TypeVar("T")

# class -> (status, code); the gateway's backend turns the code back into the class.
_STATUS: dict[type[CoeError], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request"),
    AuthenticationFailed: (401, "invalid_host_token"),
    UnknownModel: (404, "model_not_found"),
    PlacementRefused: (409, "placement_refused"),
    BodyTooLarge: (413, "body_too_large"),
    QueueFull: (503, "queue_full"),
    DeadlineUnreachable: (503, "deadline_unreachable"),
    ExpertOutOfService: (503, "expert_out_of_service"),
    HostUnavailable: (503, "host_unavailable"),
    HostLost: (503, "host_lost"),
    ExpertFailed: (502, "expert_failed"),
}


class ServingEngine(Protocol):
    """What this port needs of an engine; ``experts.vllm_engine.SwappableEngine`` is one."""

    async def serve(
        self, expert: str, endpoint: Endpoint, body: Mapping[str, Any], *, request_id: str
    ) -> dict[str, Any] | AsyncIterator[str]: ...


class HostPort:
    """Request handlers over one slot. ``host_id`` goes into every answer's headers."""

    def __init__(
        self,
        *,
        host_id: str,
        engine: ServingEngine,
        driver: SlotDriver,
        experts: tuple[str, ...],
        token: str,
        body_bytes_max: int,
        spans: HostSpans | None = None,
    ) -> None:
        self._host_id = host_id
        self._spans = spans or HostSpans(None, host_id)
        self._engine = engine
        self._driver = driver
        self._experts = experts
        self._token = token.encode()
        self._body_bytes_max = body_bytes_max
        self._placement = PlacementCommands(driver.loading, experts)

    def app(self, *, health: Callable[[], Awaitable[None]]) -> Starlette:
        async def chat(request: Request) -> Response:
            return await self._guarded(request, Endpoint.CHAT)

        async def completions(request: Request) -> Response:
            return await self._guarded(request, Endpoint.COMPLETIONS)

        async def placement(request: Request) -> Response:
            return await self._placed(request)

        async def alive(_: Request) -> Response:
            try:
                await health()
            except CoeError as error:
                return error_response(error, self._host_id)
            return JSONResponse({"status": "ok", "host": self._host_id})

        return Starlette(
            routes=[
                Route("/v1/chat/completions", chat, methods=["POST"]),
                Route("/v1/completions", completions, methods=["POST"]),
                Route(PLACEMENT_PATH, placement, methods=["POST"]),
                Route("/health", alive, methods=["GET"]),
            ]
        )

    async def _guarded(self, request: Request, endpoint: Endpoint) -> Response:
        try:
            self._authenticate(request)
            body = await self._read_body(request)
            if body.get("model") not in self._experts:
                raise UnknownModel(str(body.get("model")), self._experts)
            return await _while_connected(request, self._answer(request, endpoint, body))
        except CoeError as error:
            return error_response(error, self._host_id)
        except ClientDisconnect:
            return Response(status_code=499)

    def _authenticate(self, request: Request) -> None:
        sent = request.headers.get("authorization", "").removeprefix("Bearer ").encode()
        if not hmac.compare_digest(sent, self._token):
            raise AuthenticationFailed("The host token is missing or wrong.")

    async def _read_body(self, request: Request) -> dict[str, Any]:
        raw = bytearray()
        async for chunk in request.stream():
            raw += chunk
            if len(raw) > self._body_bytes_max:
                raise BodyTooLarge(self._body_bytes_max)
        try:
            body = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(None, f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise InvalidRequest(None, "the body must be a JSON object")
        return body

    async def _placed(self, request: Request) -> Response:
        """A command goes on when its caller leaves: half a move helps nobody."""
        try:
            self._authenticate(request)
            return JSONResponse(await self._placement.carry_out(await self._read_body(request)))
        except CoeError as error:
            return error_response(error, self._host_id)
        except ClientDisconnect:
            return Response(status_code=499)

    async def _answer(self, request: Request, endpoint: Endpoint, body: dict[str, Any]) -> Response:
        likely_next = request.headers.get("x-coe-likely-next")
        if likely_next in self._experts and likely_next != body["model"]:
            self._driver.announce(likely_next)
        async with contextlib.AsyncExitStack() as stack:
            span = self._spans.begin(request.headers, operation(endpoint.value), body["model"])
            stack.push(span.close)
            lease = await stack.enter_async_context(self._lease(request, body["model"]))
            while True:
                result = await self._first_result(request, endpoint, body, lease)
                if result is not None:
                    span.leased(body["model"], lease.queue_ms, lease.swap_ms)
                if isinstance(result, dict):
                    return JSONResponse(result, headers=self._headers(lease))
                if result is not None and lease.first_token():
                    return LeasedStream(result, stack.pop_all(), self._headers(lease))
                if result is not None:
                    await _close(result)
                await lease.requeue()  # the scheduler takes nothing back twice

    def _lease(
        self, request: Request, expert: str
    ) -> contextlib.AbstractAsyncContextManager[Lease]:
        deadline_ms = _number(request, "x-coe-queue-deadline-ms")
        return self._driver.lease(
            expert,
            request_id=_request_id(request),
            priority=int(_number(request, "x-coe-priority") or 0),
            queue_deadline_ms=deadline_ms,
        )

    def _headers(self, lease: Lease) -> dict[str, str]:
        return {
            "x-coe-host": self._host_id,
            "x-coe-queue-ms": f"{lease.queue_ms:.1f}",
            "x-coe-swap-ms": f"{lease.swap_ms:.1f}",
        }

    async def _first_result(
        self, request: Request, endpoint: Endpoint, body: dict[str, Any], lease: Lease
    ) -> dict[str, Any] | AsyncIterator[str] | None:
        """A whole body, or an iterator whose first event is there; None if taken back before."""
        generation = _generate(self._engine, endpoint, body, request_id=_request_id(request))
        return await _unless(generation, lease.aborted.wait())


async def _generate(
    engine: ServingEngine, endpoint: Endpoint, body: dict[str, Any], *, request_id: str
) -> dict[str, Any] | AsyncIterator[str]:
    """A whole body, or a stream whose first event is there; the engine's refusals as errors."""
    result = await engine.serve(body["model"], endpoint, body, request_id=request_id)
    if isinstance(result, dict):
        return result
    try:
        first = await anext(result)
        _refuse_error_event(body["model"], first)
    except StopAsyncIteration as error:
        raise ExpertFailed(body["model"], 500, "the engine sent nothing") from error
    except BaseException:
        await _close(result)
        raise
    return _Peeked(first, result)


def _refuse_error_event(expert: str, event: str) -> None:
    """An engine that fails before its first token says so in an event; no status is sent yet."""
    error = next(
        (e for data in SseDecoder().feed(event.encode()) if (e := error_from_event(expert, data))),
        None,
    )
    if error is not None and error.status < 500:
        raise InvalidRequest(error.error_param, error.detail)
    if error is not None:
        raise error


class _Peeked:
    """An SSE iterator with its first event already taken. Closing it aborts the generation."""

    def __init__(self, first: str, rest: AsyncIterator[str]) -> None:
        self._first: str | None = first
        self._rest = rest

    def __aiter__(self) -> _Peeked:
        return self

    async def __anext__(self) -> str:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return await anext(self._rest)

    async def aclose(self) -> None:
        await _close(self._rest)


class LeasedStream(StreamingResponse):
    """A stream that owns its lease: however it ends, the generation stops and the lease goes back.

    The clean-up is here and not in the generator, because a client that leaves before the first
    byte makes Starlette drop a generator it never started, and such a generator's ``finally`` never
    runs. It is shielded, because a lease left open would block every later swap.
    """

    def __init__(
        self,
        events: AsyncIterator[str],
        lease: contextlib.AsyncExitStack,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._events = events
        self._lease = lease

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await asyncio.shield(self._finish())

    async def aclose(self) -> None:
        """End a stream that nobody will send."""
        await asyncio.shield(self._finish())

    async def _finish(self) -> None:
        async with self._lease:
            await _close(self._events)


async def _close(thing: object) -> None:
    """Close what can be closed: a stream of events, or the response that sends one."""
    aclose = getattr(thing, "aclose", None)
    if aclose is not None:
        await aclose()


async def _while_connected(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """Run ``answer``; cancel it, queue place and generation included, when the client leaves."""
    response = await _unless(answer, _disconnected(request))
    if response is None:
        raise ClientDisconnect
    return response


async def _unless(work: Coroutine[Any, Any, T], event: Coroutine[Any, Any, object]) -> T | None:
    """The result of ``work``; None, and ``work`` has ended, when ``event`` comes before it.

    Whatever ``work`` makes that nobody receives is closed: a generation may outlive neither its
    lease nor its client.
    """
    working, waiting = asyncio.ensure_future(work), asyncio.ensure_future(event)
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        await _end(working)
        raise
    finally:
        waiting.cancel()
    if working.done():
        return working.result()
    await _end(working)
    return None


async def _end(working: asyncio.Future[Any]) -> None:
    working.cancel()
    await asyncio.wait({working})
    # It may have finished in the same turn, or have turned the cancellation into an answer.
    if not working.cancelled() and working.exception() is None:
        await _close(working.result())


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _number(request: Request, header: str) -> float | None:
    text = request.headers.get(header)
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InvalidRequest(header, "expected a number")
    return number


def _request_id(request: Request) -> str:
    return request.headers.get("x-request-id", "")[:128] or f"req-{id(request):x}"


def error_response(error: CoeError, host_id: str) -> JSONResponse:
    """The OpenAI error body with the code by which the gateway recognises the class."""
    status, code = _STATUS.get(type(error), (500, "host_error"))
    headers = {"x-coe-host": host_id}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    kind = "invalid_request_error" if status < 500 else "server_error"
    # The gateway puts "Expert ... answered" before it, as for every expert.
    message = error.detail if isinstance(error, ExpertFailed) else error.message
    detail = {"message": message, "type": kind, "param": error.param, "code": code}
    for name in ("depth", "wait_ms", "deadline_ms", "retry_after_ms", "reason"):
        if hasattr(error, name):
            detail[name] = getattr(error, name)
    return JSONResponse({"error": detail}, status_code=status, headers=headers)
