"""What a client may cost before and beside its request: bounds that uvicorn does not have.

The server's protocol, with a limit on the size of a request's head and of what frames its body,
times within which head and body have to be there, a number of connections, and a time within which
a client that does not read has to make room. None of it costs the usual request more than a few
comparisons and one timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from gateway.joined_writes import JoinedWrites

__all__ = ["BoundedHttpProtocol", "ConnectionLimits", "protocol_with"]

# The frame of a body sent byte by byte ("1", CR LF, the byte, CR LF), with room to spare.
_FRAME_PER_BODY_BYTE = 9
_FIRST_REQUEST_S = 0.5  # what a connection that was just accepted gets when the server ends


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """``header_bytes``: of a head, and once more of trailers and chunk extensions together.
    ``header_timeout_ms``: from a request's first byte (or the connection's begin) to the end of
    its head. ``body_timeout_ms``: from there to the end of its body. ``stalled_write_ms``: how long
    a full send buffer may stay full, while an expert goes on generating. ``keep_alive_s``: how long
    an idle connection stays open.
    """

    header_bytes: int = 32 * 1024
    header_timeout_ms: float = 10_000.0
    body_timeout_ms: float = 30_000.0
    stalled_write_ms: float = 30_000.0
    keep_alive_s: int = 5
    connections: int = 4_096


def protocol_with(limits: ConnectionLimits) -> type[BoundedHttpProtocol]:
    """The protocol class to give to uvicorn."""
    return type("LimitedHttpProtocol", (BoundedHttpProtocol,), {"limits": limits})


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. A request that arrives in one piece arms no timer but the connection's."""

    limits = ConnectionLimits()

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._in_head = self._in_body = self._refused = False
        self._head_bytes = 0
        self._piece_bytes = 0  # of the read that is being parsed
        self._asked = False  # a request has begun to arrive, once
        self._is_last = False  # the server ends: one request at most is still taken
        self._frame_bytes = 0  # since the head, beyond what the body's own bytes account for
        self._arriving: asyncio.TimerHandle | None = None  # a head or a body is under way
        self._stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(JoinedWrites(transport, self.loop))
        if len(self.connections) > self.limits.connections:
            self._refuse(503, "too_many_connections")
        else:
            self._expect(self.limits.header_timeout_ms, self._head_is_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        self._stop_stalled()
        super().connection_lost(exc)

    # --- a request's way in ----------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        if self._in_body:
            self._frame_bytes += len(data)
        self._piece_bytes = len(data)
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
        within = self._head_bytes <= self.limits.header_bytes >= self._frame_bytes
        if not within and (self._in_head or self._in_body):
            self._cut_off(431, "headers_too_large")
        if self._refused or self._arriving is not None:
            return
        if self._in_body:
            self._expect(self.limits.body_timeout_ms, self._body_is_late)
        elif self._is_idle():
            # Not even a head's first byte need be there: a client may trickle empty lines.
            self._expect(self.limits.header_timeout_ms, self._head_is_late)

    def on_message_begin(self) -> None:
        self._in_head = self._asked = True
        self._head_bytes = self._frame_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Trailers are read over: uvicorn would add them to the headers, without an end."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        at_most = self._head_bytes + self._piece_bytes
        self._in_head, self._in_body = False, True
        self._head_bytes = self._frame_bytes = 0
        self._arrived()
        if at_most > self.limits.header_bytes:
            sent = self._sent_bytes()
            if sent > self.limits.header_bytes:
                self._refuse(431, "headers_too_large")
                return
            self._frame_bytes = at_most - sent  # came in the same piece; ``on_body`` takes its own
        super().on_headers_complete()
        if self._is_last:
            self.cycle.keep_alive = False

    def shutdown(self) -> None:
        """The server ends. Who connected a moment ago is about to ask, and is still answered."""
        if self._asked and not self._in_head:
            super().shutdown()
            return
        self._is_last = True
        if not self._asked:
            self.loop.call_later(_FIRST_REQUEST_S, self._close_if_silent)

    def _close_if_silent(self) -> None:
        if not self._asked:
            self.transport.close()

    def on_body(self, body: bytes) -> None:
        self._frame_bytes = max(0, self._frame_bytes - _FRAME_PER_BODY_BYTE * len(body))
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        self._arrived()
        if not self._refused:
            super().on_message_complete()

    def _sent_bytes(self) -> int:
        """The head's size, whether or not some of the body came in the same piece."""
        return sum(len(name) + len(value) for name, value in self.headers) + len(self.url)

    def _is_idle(self) -> bool:
        return self._in_head or self.cycle is None or self.cycle.response_complete

    def _expect(self, within_ms: float, late: Callable[[], None]) -> None:
        self._arriving = self.loop.call_later(within_ms / 1000.0, late)

    def _arrived(self) -> None:
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

    def _head_is_late(self) -> None:
        self._arriving = None
        if self._in_head:
            self._refuse(408, "request_timeout")
        else:
            self.transport.close()

    def _body_is_late(self) -> None:
        self._arriving = None
        self._cut_off(408, "request_timeout")

    def send_400_response(self, msg: str) -> None:
        """uvicorn's own answer to what is no HTTP is plain text."""
        self._cut_off(400, "malformed_http")

    def _cut_off(self, status: int, code: str) -> None:
        """Refuse, unless an answer is on its way already: nothing may stand in the middle of it."""
        answering = self.cycle is not None and self.cycle.response_started
        if answering and not self.cycle.response_complete:
            self._refused = True
            self._arrived()
            self.transport.close()
        else:
            self._refuse(status, code)

    def _refuse(self, status: int, code: str) -> None:
        """Answer without the application, which sees a client that has left, and hang up."""
        self._refused = True
        self._arrived()
        if self.transport.is_closing():
            return
        phrase = HTTPStatus(status).phrase
        kind = "overloaded_error" if status >= 500 else "invalid_request_error"
        error = {"message": f"{phrase}.", "type": kind, "param": None, "code": code}
        body = msgspec.json.encode({"error": error})
        head = (
            f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    # --- a client that does not read -------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stalled is None:
            wait_s = self.limits.stalled_write_ms / 1000.0
            self._stalled = self.loop.call_later(wait_s, self._hang_up)

    def resume_writing(self) -> None:
        self._stop_stalled()
        super().resume_writing()

    def _hang_up(self) -> None:
        """Not ``close``: that would wait for the very buffer that does not empty."""
        self._stalled = None
        self.transport.abort()

    def _stop_stalled(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
