"""Bounds at the door, as pure ASGI middleware: size of a body, number of requests at once."""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from experts.errors import BodyTooLarge, QueueFull
from gateway.anthropic_errors import answer_on

__all__ = ["BodyLimit", "ConcurrencyLimit"]

_RETRY_AFTER_MS = 1_000.0


class BodyLimit:
    """Answers 413 by Content-Length; a chunked body that grows past the bound raises BodyTooLarge.

    Whoever reads the body turns the exception into the answer, as with any other error.
    """

    def __init__(self, app: ASGIApp, *, body_bytes_max: int) -> None:
        self._app = app
        self._body_bytes_max = body_bytes_max

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        declared = _content_length(scope)
        if declared is None:
            await self._app(scope, self._counted(receive), send)
        elif declared <= self._body_bytes_max:  # the server enforces what was declared
            await self._app(scope, receive, send)
        else:
            await _send_error(scope, send, BodyTooLarge(self._body_bytes_max))

    def _counted(self, receive: Receive) -> Receive:
        size = 0

        async def receive_counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._body_bytes_max:
                raise BodyTooLarge(self._body_bytes_max)
            return message

        return receive_counted


class ConcurrencyLimit:
    """Refuses at once, with 503, what would exceed the number of requests this worker holds.

    Health, metrics and the model list are not counted: they must answer when the rest is full.
    ``on_change`` is told the number in flight.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        requests_max: int,
        on_change: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._app = app
        self._requests_max = requests_max
        self._on_change = on_change
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._in_flight >= self._requests_max:
            error = QueueFull("gateway", self._in_flight, _RETRY_AFTER_MS)
            await _send_error(scope, send, error)
            return
        self._changed(+1)
        try:
            await self._app(scope, receive, send)
        finally:
            self._changed(-1)

    def _changed(self, by: int) -> None:
        self._in_flight += by
        self._on_change(self._in_flight)


def _content_length(scope: Scope) -> int | None:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value) if value.isdigit() else None
    return None


async def _send_error(scope: Scope, send: Send, error: BodyTooLarge | QueueFull) -> None:
    answer = answer_on(scope, error)
    await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
    await send({"type": "http.response.body", "body": answer.body})
