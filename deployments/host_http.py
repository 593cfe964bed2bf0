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
from typing import Any, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deployments.swap.driver import Lease, SlotDriver
from experts.errors import (
    AuthenticationFailed,
    BodyTooLarge,
    CoeError,
    DeadlineUnreachable,
    ExpertFailed,
    ExpertOutOfService,
    HostUnavailable,
    InvalidRequest,
    QueueFull,
    UnknownModel,
)
from experts.types import Endpoint

log = logging.getLogger(__name__)

# class -> (status, code); the gateway's backend turns the code back into the class.
_STATUS: dict[type[CoeError], tuple[int, str]] = {
    InvalidRequest: (400, "invalid_request"),
    AuthenticationFailed: (401, "invalid_host_token"),
    UnknownModel: (404, "model_not_found"),
    BodyTooLarge: (413, "body_too_large"),
    QueueFull: (503, "queue_full"),
    DeadlineUnreachable: (503, "deadline_unreachable"),
    ExpertOutOfService: (503, "expert_out_of_service"),
    HostUnavailable: (503, "host_unavailable"),
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
    ) -> None:
        self._host_id = host_id
        self._engine = engine
        self._driver = driver
        self._experts = experts
        self._token = token.encode()
        self._body_bytes_max = body_bytes_max

    def app(self, *, health: Callable[[], Awaitable[None]]) -> Starlette:
        async def chat(request: Request) -> Response:
            return await self._guarded(request, Endpoint.CHAT)

        async def completions(request: Request) -> Response:
            return await self._guarded(request, Endpoint.COMPLETIONS)

        async def alive(_: Request) -> Response:
            await health()
            return JSONResponse({"status": "ok", "host": self._host_id})

        return Starlette(
            routes=[
                Route("/v1/chat/completions", chat, methods=["POST"]),
                Route("/v1/completions", completions, methods=["POST"]),
                Route("/health", alive, methods=["GET"]),
            ]
        )

    async def _guarded(self, request: Request, endpoint: Endpoint) -> Response:
        try:
            self._authenticate(request)
            body = await self._read_body(request)
            return await _while_connected(request, self._answer(request, endpoint, body))
        except CoeError as error:
            return error_response(error)
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
        except msgspec.DecodeError as error:
            raise InvalidRequest(None, f"the body is not JSON: {error}") from error
        if not isinstance(body, dict):
            raise InvalidRequest(None, "the body must be a JSON object")
        if body.get("model") not in self._experts:
            raise UnknownModel(str(body.get("model")), self._experts)
        return body

    async def _answer(self, request: Request, endpoint: Endpoint, body: dict[str, Any]) -> Response:
        async with contextlib.AsyncExitStack() as stack:
            lease = await stack.enter_async_context(self._lease(request, body["model"]))
            while True:
                result = await self._first_result(request, endpoint, body, lease)
                if isinstance(result, dict):
                    return JSONResponse(result, headers=self._headers(lease))
                if result is not None and lease.first_token():
                    return LeasedStream(result, stack.pop_all(), self._headers(lease))
                if result is not None:
                    await _close(result)
                await lease.requeue()
                # Taken back once already: a second time could starve it for ever.
                lease.first_token()

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
        work = asyncio.ensure_future(
            _generate(self._engine, endpoint, body, request_id=_request_id(request))
        )
        aborted = asyncio.ensure_future(lease.aborted.wait())
        try:
            await asyncio.wait({work, aborted}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            aborted.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
        return None if work.cancelled() else work.result()


async def _generate(
    engine: ServingEngine, endpoint: Endpoint, body: dict[str, Any], *, request_id: str
) -> dict[str, Any] | AsyncIterator[str]:
    result = await engine.serve(body["model"], endpoint, body, request_id=request_id)
    if isinstance(result, dict):
        return result
    try:
        return _Peeked(await anext(result), result)
    except BaseException:
        await _close(result)
        raise


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

    async def _finish(self) -> None:
        async with self._lease:
            await _close(self._events)


async def _close(events: AsyncIterator[str]) -> None:
    aclose = getattr(events, "aclose", None)
    if aclose is not None:
        await aclose()


async def _while_connected(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """Run ``answer``; cancel it, queue place and generation included, when the client leaves."""
    work = asyncio.ensure_future(answer)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
    if work.cancelled():
        raise ClientDisconnect
    return work.result()


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


def error_response(error: CoeError) -> JSONResponse:
    """The OpenAI error body with the code by which the gateway recognises the class."""
    status, code = _STATUS.get(type(error), (500, "host_error"))
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    kind = "invalid_request_error" if status < 500 else "server_error"
    detail = {"message": error.message, "type": kind, "param": error.param, "code": code}
    for name in ("depth", "wait_ms", "deadline_ms", "retry_after_ms", "reason"):
        if hasattr(error, name):
            detail[name] = getattr(error, name)
    return JSONResponse({"error": detail}, status_code=status, headers=headers)
