"""One HTTP/1.1 connection to an expert, and the answer that is being read from it.

Why not an HTTP client library: ``docs/adr/0013-a-small-http-client.md``. llhttp (by ``httptools``)
parses and asyncio owns the socket; what stands here is who waits for what. It knows no names, no
deadlines and no retries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, cast

import httptools

__all__ = ["HttpConnection", "HttpResponse", "UpstreamProtocolError"]

FRAMING_BYTES_MAX: Final = 64 * 1024  # heads and trailers; looked at after each read
_FRAMING_PER_BODY_BYTE: Final = 8  # what the smallest chunks may cost
BUFFER_BYTES_HIGH: Final = 256 * 1024  # above this nothing more is read until somebody takes it


class UpstreamProtocolError(ConnectionError):
    """The other side does not speak HTTP/1.1 as we understand it."""


class HttpResponse:
    """Status and headers, then the body as it arrives. For one reader, who has to ``close`` it.

    ``headers`` are in lower case; a repeated one is joined by commas (RFC 9110, section 5.3).
    """

    __slots__ = (
        "_buffered_bytes",
        "_connection",
        "_error",
        "_loop",
        "_parts",
        "_timer",
        "_waiter",
        "complete",
        "has_head",
        "headers",
        "status",
    )

    def __init__(self, connection: HttpConnection, loop: asyncio.AbstractEventLoop) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.has_head = False
        self.complete = False
        self._connection = connection
        self._loop = loop
        self._parts: list[bytes] = []
        self._buffered_bytes = 0
        self._error: OSError | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def head(self) -> None:
        """Wait for status and headers.

        Raises:
            ConnectionError: the connection ended first.
            TimeoutError: the time given by ``until`` ended first.
        """
        while not self.has_head:
            if self._error is not None:
                raise self._error
            await self._news()

    async def read(self) -> bytes:
        """What has arrived and was not read yet, at least one byte; empty at the end of the body.

        Raises:
            ConnectionError: the connection ended within the body.
            TimeoutError: the time given by ``until`` did.
        """
        while not self._parts:
            if self._error is not None:
                raise self._error
            if self.complete:
                return b""
            await self._news()
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._buffered_bytes = 0
        self._connection.resume_reading()
        return data

    def until(self, when_s: float | None) -> None:
        """Fail at this time of the loop's clock, wherever the answer is then; None: never.

        One timer and no task to cancel: this stands in the way of every request, and
        ``asyncio.timeout`` would cost as much as parsing the answer.
        """
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if when_s is None else self._loop.call_at(when_s, self._overrun)

    def close(self) -> None:
        """Give the connection back; before the end of the answer, cut it. May be called again."""
        self.until(None)
        self._connection.finish(self)

    # --- the connection's side -------------------------------------------------------------------

    def add(self, data: bytes) -> bool:
        """Take a piece of the body; whether the buffer is now full."""
        self._parts.append(data)
        self._buffered_bytes += len(data)
        self.wake()
        return self._buffered_bytes > BUFFER_BYTES_HIGH

    def fail(self, error: OSError) -> None:
        if self._error is None and not self.complete:
            self._error = error
            self.wake()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _overrun(self) -> None:
        self._timer = None
        self.fail(TimeoutError("the time for the answer is over"))

    async def _news(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class HttpConnection(asyncio.Protocol):
    """A socket that carries one request at a time.

    ``free`` is called once for each request, when its answer was closed; ``lost`` once, when the
    socket is gone. The methods that begin with ``on_`` are llhttp's events.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        free: Callable[[HttpConnection], None],
        lost: Callable[[HttpConnection], None],
    ) -> None:
        self._loop = loop
        self._free = free
        self._lost = lost
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._response: HttpResponse | None = None
        self._framing_bytes = 0
        self._body_bytes = 0  # of the read that is being parsed
        self._framed = False  # the head says how long the body is; else the connection's end does
        self._keep_alive = False
        self._paused = False
        self._aborted = False
        self.idle_since_s = 0.0  # kept by the pool

    @property
    def reusable(self) -> bool:
        """Whether the next request can go over it: open, and the last one was sent to its end."""
        transport = self._transport
        return (
            self._keep_alive
            and transport is not None
            and not transport.is_closing()
            and transport.get_write_buffer_size() == 0
        )

    def send(self, request: bytes) -> HttpResponse:
        """Send a whole request.

        Raises:
            ConnectionResetError: the connection is closed; nothing was sent.
        """
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("closed before the request was sent")
        self._response = response = HttpResponse(self, self._loop)
        self._framing_bytes = 0
        self._framed = self._keep_alive = False
        self._transport.write(request)
        return response

    def finish(self, response: HttpResponse) -> None:
        if response is not self._response:
            return
        self._response = None
        self.resume_reading()
        if not (response.complete and self.reusable):
            self.abort()
            response.fail(ConnectionAbortedError("closed by its reader"))
        self._free(self)

    def abort(self) -> None:
        """Close at once, unsent bytes or not: the other side may stop working on the answer."""
        self._keep_alive = False
        self._aborted = True
        if self._transport is not None:
            self._transport.abort()

    def resume_reading(self) -> None:
        if self._paused:
            self._paused = False
            if self._transport is not None:
                self._transport.resume_reading()

    # --- asyncio.Protocol ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one by its methods only
        if self._aborted:  # while it was being opened
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None or response.complete:
            self.abort()  # nobody asked for this
            return
        self._body_bytes = 0
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._break(UpstreamProtocolError(f"not HTTP/1.1: {error}"))
            return
        around = len(data) - (1 + _FRAMING_PER_BODY_BYTE) * self._body_bytes
        self._framing_bytes = max(0, self._framing_bytes + around)
        if self._framing_bytes > FRAMING_BYTES_MAX:
            reason = f"more than {FRAMING_BYTES_MAX} bytes of headers or trailers"
            self._break(UpstreamProtocolError(reason))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost(self)
        response = self._response
        if response is None or response.complete:
            return
        ended = exc is None and not self._aborted
        if ended and response.has_head and not self._framed:
            response.complete = True
            response.wake()
        else:
            response.fail(ConnectionResetError("closed before the end of the answer"))

    # --- httptools.HttpResponseParser ------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._response is None or self._response.complete:
            raise UpstreamProtocolError("more than one answer to a request")

    def on_header(self, name: bytes, value: bytes) -> None:
        response = self._response
        if response is None or response.has_head:
            return  # a trailer
        key = name.decode("latin-1").lower()
        text = value.decode("latin-1")
        headers = response.headers
        headers[key] = f"{headers[key]}, {text}" if key in headers else text

    def on_headers_complete(self) -> None:
        response = self._response
        if response is None:
            return
        status = self._parser.get_status_code()
        if status < 200:  # an interim answer, such as 100 Continue: the real one follows
            response.headers.clear()
            return
        response.status = status
        response.has_head = True
        self._framed = "content-length" in response.headers or (
            "transfer-encoding" in response.headers
        )
        response.wake()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        response = self._response
        if response is not None and response.add(body) and not self._paused:
            self._paused = True
            if self._transport is not None:
                self._transport.pause_reading()

    def on_message_complete(self) -> None:
        response = self._response
        if response is None or not response.has_head:
            return  # an interim answer
        response.complete = True
        self._keep_alive = self._parser.should_keep_alive()
        response.wake()

    def _break(self, error: UpstreamProtocolError) -> None:
        self.abort()
        if self._response is not None:
            self._response.fail(error)
