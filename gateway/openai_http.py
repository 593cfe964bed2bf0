"""The two hot endpoints as plain ASGI: chat completions and completions, streamed or whole."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from experts.errors import CoeError, InvalidRequest
from experts.types import Endpoint
from gateway.client_watch import ClientGone, ClientWatch
from gateway.headers import Header, coe_headers, request_id_of
from gateway.http_errors import answer_for, error_object
from gateway.journal import Journal
from gateway.keys import sent_secret
from gateway.plan_run import OpenAnswer
from gateway.service import GatewayService
from gateway.sse import DONE_EVENT, KEEP_ALIVE, framed
from gateway.wire import WireRequest, parse_request

__all__ = ["KeepAlive", "OpenAiEndpoint", "read_body"]

_STREAM_HEADERS: list[Header] = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold tokens back
]


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """When to write comments into a stream that has nothing to say yet.

    The first comment commits to status 200, so it waits for a grace period in which an error can
    still become an error status.
    """

    grace_ms: float = 10_000.0
    interval_ms: float = 10_000.0


class OpenAiEndpoint:
    """One of the endpoints, as an ASGI application."""

    def __init__(
        self, service: GatewayService, endpoint: Endpoint, keep_alive: KeepAlive | None = None
    ) -> None:
        self._service = service
        self._endpoint = endpoint
        self._keep_alive = keep_alive or KeepAlive()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._service.journal(self._endpoint.value, request_id_of(scope)) as journal:
            await self._serve(journal, sent_secret(scope["headers"]), receive, send)

    async def _serve(
        self, journal: Journal, secret: str | None, receive: Receive, send: Send
    ) -> None:
        try:
            journal.access = await self._service.authenticate(secret)
            raw = await read_body(receive)
            async with ClientWatch(receive) as watch:
                request = parse_request(raw, self._endpoint)
                answer = self._stream if request.stream else self._complete
                await answer(request, journal, send, watch)
        except ClientGone:
            journal.outcome = "client_closed"
        except CoeError as error:
            journal.outcome, journal.error = "error", error
            await self._service.settle(journal)
            await _send_error(send, error, journal)

    async def _complete(
        self, request: WireRequest, journal: Journal, send: Send, watch: ClientWatch
    ) -> None:
        body = msgspec.json.encode(await self._service.complete(request, journal))
        await self._service.settle(journal)
        headers: list[Header] = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            *coe_headers(journal, whole=True),
        ]
        watch.disarm()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(
        self, request: WireRequest, journal: Journal, send: Send, watch: ClientWatch
    ) -> None:
        out = _EventSender(send, journal, watch)
        try:
            async with (
                _KeepingAlive(out, self._keep_alive) as keeping,
                self._service.stream(request, journal) as answer,
            ):
                await keeping.stop()
                await _relay(answer, out)
                await self._service.settle(journal)
                await out.end(DONE_EVENT)
        except CoeError as error:
            if not out.started:
                raise
            journal.outcome, journal.error = "error", error
            await self._service.settle(journal)
            await out.event(error_object(error))
            await out.end(b"")


async def _relay(answer: OpenAnswer, out: _EventSender) -> None:
    async with aclosing(answer.batches()) as batches:
        async for payloads in batches:
            await out.write(framed(payloads))


class _EventSender:
    """Writes one event stream; sends the headers before the first byte."""

    def __init__(self, send: Send, journal: Journal, watch: ClientWatch) -> None:
        self._send = send
        self._journal = journal
        self._watch = watch
        self.started = False

    async def write(self, data: bytes) -> None:
        if not self.started:
            await self._start()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def event(self, payload: dict[str, Any]) -> None:
        await self.write(framed([msgspec.json.encode(payload)]))

    async def end(self, data: bytes) -> None:
        if not self.started:
            await self._start()
        self._watch.disarm()
        await self._send({"type": "http.response.body", "body": data})

    async def _start(self) -> None:
        self.started = True
        headers = [*_STREAM_HEADERS, *coe_headers(self._journal, whole=False)]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})


class _KeepingAlive:
    """Writes comments from the end of the grace period until stopped.

    Costs one timer on the usual path; the task exists only once the grace period is over.
    """

    def __init__(self, out: _EventSender, settings: KeepAlive) -> None:
        self._out = out
        self._settings = settings
        self._writer: asyncio.Task[None] | None = None

    async def __aenter__(self) -> _KeepingAlive:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._settings.grace_ms / 1000.0, self._begin)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """No comment is written after this returns."""
        self._timer.cancel()
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.cancel()
            await asyncio.wait({writer})

    def _begin(self) -> None:
        self._writer = asyncio.ensure_future(self._write())

    async def _write(self) -> None:
        while True:
            await self._out.write(KEEP_ALIVE)
            await asyncio.sleep(self._settings.interval_ms / 1000.0)


async def read_body(receive: Receive) -> bytes:
    """The whole request body.

    Raises:
        ClientGone: the client left while sending.
    """
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        return message.get("body", b"")  # type: ignore[no-any-return]
    parts: list[bytes] = []
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
        message = await receive()


async def _send_error(send: Send, error: CoeError, journal: Journal) -> None:
    answer = answer_for(error, spent=journal.paid)
    headers = [*answer.headers, *coe_headers(journal, whole=True)]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


class RouteEndpoint:
    """``POST /v1/route``: takes the body of either endpoint, answers with the decision."""

    def __init__(self, service: GatewayService) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._service.journal("route", request_id_of(scope)) as journal:
            await self._serve(journal, sent_secret(scope["headers"]), receive, send)

    async def _serve(
        self, journal: Journal, secret: str | None, receive: Receive, send: Send
    ) -> None:
        try:
            journal.access = await self._service.authenticate(secret)
            request = parse_route_request(await read_body(receive))
            view = await self._service.explain(request, journal)
        except ClientGone:
            journal.outcome = "client_closed"
            return
        except CoeError as error:
            journal.outcome, journal.error = "error", error
            await _send_error(send, error, journal)
            return
        body = msgspec.json.encode({"object": "route", "decision_id": journal.decision_id, **view})
        headers: list[Header] = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            *coe_headers(journal, whole=False),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def parse_route_request(raw: bytes) -> WireRequest:
    """A chat body if it has messages, a completions body if it has a prompt."""
    try:
        return parse_request(raw, Endpoint.CHAT)
    except InvalidRequest as error:
        if error.field_name != "messages" or b'"prompt"' not in raw:
            raise
    return parse_request(raw, Endpoint.COMPLETIONS)
