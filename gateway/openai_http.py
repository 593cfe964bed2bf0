"""The answering endpoints as plain ASGI, streamed or whole, in whatever dialect they speak."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import aclosing
from dataclasses import dataclass

import msgspec
from starlette.types import Receive, Scope, Send

from experts.answer_shape import OddAnswer
from experts.errors import CoeError, ExpertFailed, InvalidRequest
from experts.types import Endpoint
from gateway.affinity import sent_session
from gateway.client_watch import ClientGone, ClientWatch
from gateway.dialect import Dialect, StreamWriter
from gateway.headers import Header, coe_headers, request_id_of
from gateway.http_errors import ErrorAnswer, answer_for
from gateway.journal import Journal
from gateway.keys import sent_secret
from gateway.plan_run import OpenAnswer
from gateway.service import GatewayService
from gateway.wire import WireRequest, parse_request

__all__ = ["AnswerEndpoint", "KeepAlive", "RouteEndpoint", "parse_route_request", "read_body"]

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


class AnswerEndpoint:
    """One of the endpoints, as an ASGI application."""

    def __init__(
        self, service: GatewayService, dialect: Dialect, keep_alive: KeepAlive | None = None
    ) -> None:
        self._service = service
        self._dialect = dialect
        self._keep_alive = keep_alive or KeepAlive()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._service.journal(self._dialect.name, request_id_of(scope)) as journal:
            journal.client_session = sent_session(scope["headers"])
            await self._serve(journal, sent_secret(scope["headers"]), receive, send)

    async def _serve(
        self, journal: Journal, secret: str | None, receive: Receive, send: Send
    ) -> None:
        try:
            journal.access = await self._service.authenticate(secret)
            raw = await read_body(receive)
            async with ClientWatch(receive) as watch:
                request = self._dialect.parse(raw)
                answer = self._stream if request.stream else self._complete
                await answer(request, journal, send, watch)
        except ClientGone:
            journal.outcome = "client_closed"
        except CoeError as error:
            journal.outcome, journal.error = "error", error
            await self._service.settle(journal)
            await self._refuse(send, error, journal)

    async def _refuse(self, send: Send, error: CoeError, journal: Journal) -> None:
        extra = self._dialect.headers(journal)
        await _send_refusal(send, self._dialect.refusal(error, journal), journal, extra)

    async def _complete(
        self, request: WireRequest, journal: Journal, send: Send, watch: ClientWatch
    ) -> None:
        answer = await self._service.complete(request, journal)
        body = msgspec.json.encode(self._dialect.whole(answer, request, journal))
        await self._service.settle(journal)
        headers: list[Header] = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            *coe_headers(journal, whole=True),
            *self._dialect.headers(journal),
        ]
        watch.disarm()
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(
        self, request: WireRequest, journal: Journal, send: Send, watch: ClientWatch
    ) -> None:
        out = _EventSender(send, journal, watch, self._dialect)
        writer = self._dialect.writer(request, journal)
        try:
            async with (
                _KeepingAlive(out, self._keep_alive) as keeping,
                self._service.stream(request, journal) as answer,
            ):
                await keeping.stop()
                await _relay(answer, writer, out)
                await self._service.settle(journal)
                await out.end(writer.end())
        except CoeError as error:
            if not out.started:
                raise
            journal.outcome, journal.error = "error", error
            await self._service.settle(journal)
            await out.end(writer.failed(error))


async def _relay(answer: OpenAnswer, writer: StreamWriter, out: _EventSender) -> None:
    async with aclosing(answer.batches()) as batches:
        async for payloads in batches:
            try:
                data = writer.write(payloads)
            except OddAnswer as error:
                raise ExpertFailed(answer.note.expert, 502, str(error)) from error
            if data:
                await out.write(data)


class _EventSender:
    """Writes one event stream; sends the headers before the first byte."""

    def __init__(self, send: Send, journal: Journal, watch: ClientWatch, dialect: Dialect) -> None:
        self._send = send
        self._journal = journal
        self._watch = watch
        self._dialect = dialect
        self.started = False

    async def write(self, data: bytes) -> None:
        if not self.started:
            await self._start()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def keep_alive(self) -> None:
        await self.write(self._dialect.keep_alive)

    async def end(self, data: bytes) -> None:
        if not self.started:
            await self._start()
        self._watch.disarm()
        await self._send({"type": "http.response.body", "body": data})

    async def _start(self) -> None:
        self.started = True
        headers = [
            *_STREAM_HEADERS,
            *coe_headers(self._journal, whole=False),
            *self._dialect.headers(self._journal),
        ]
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
            await self._out.keep_alive()
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


async def _send_refusal(
    send: Send, answer: ErrorAnswer, journal: Journal, extra: Iterable[Header] = ()
) -> None:
    headers = [*answer.headers, *coe_headers(journal, whole=True), *extra]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


class RouteEndpoint:
    """``POST /v1/route``: takes the body of either endpoint, answers with the decision."""

    def __init__(self, service: GatewayService) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._service.journal("route", request_id_of(scope)) as journal:
            journal.client_session = sent_session(scope["headers"])
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
            await _send_refusal(send, answer_for(error), journal)
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
