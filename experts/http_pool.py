"""A bounded pool of connections to one origin, and the requests that go over them."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from aiohappyeyeballs import start_connection

from experts.http_connection import HttpConnection, HttpResponse

__all__ = ["ConnectTimeout", "HttpPool", "PoolFull", "PoolLimits"]

_NOT_IN_A_HEADER = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_NEXT_ADDRESS_S = 0.25  # RFC 8305: how long an address may be silent before the next is tried
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Bounds of one backend's connections.

    ``keepalive_s`` stays below the 5 s after which uvicorn closes an idle connection, so that a
    request is not sent into a connection that is being closed.
    """

    connections_max: int = 1024
    connect_timeout_ms: float = 5_000.0
    keepalive_s: float = 4.0
    reply_bytes_max: int = 64 * 1024 * 1024


class ConnectTimeout(TimeoutError):
    """No connection within ``connect_timeout_ms``."""


class PoolFull(TimeoutError):
    """Every connection stayed in use for ``waited_s``."""

    def __init__(self, waited_s: float) -> None:
        super().__init__(f"every connection stayed in use for {waited_s:.1f} s")
        self.waited_s = waited_s


class HttpPool:
    """Posts JSON to ``base_url``. Belongs to the event loop in which it was made.

    ``tls`` is for https; by default the system's authorities and the host's name are checked.
    Requests beyond ``connections_max`` wait, in order, for half of their time at most: whoever is
    asked must have time to answer, or our own crowd would pass for the other side's slowness.
    """

    def __init__(
        self, base_url: str, limits: PoolLimits, *, tls: ssl.SSLContext | None = None
    ) -> None:
        parts = urlsplit(base_url)
        if parts.scheme not in _PORTS or not parts.hostname:
            raise ValueError(f"an http or https URL is needed, not {base_url!r}")
        self._host = parts.hostname
        self._port = parts.port or _PORTS[parts.scheme]
        self._tls = (tls or ssl.create_default_context()) if parts.scheme == "https" else None
        self._path = parts.path.rstrip("/")
        self._fixed_headers = (
            f"host: {parts.netloc.rpartition('@')[2]}\r\n"
            "content-type: application/json\r\naccept: */*\r\n"
            # A compressed event stream arrives in blocks, not token by token.
            "accept-encoding: identity\r\n"
        )
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._free = asyncio.Semaphore(limits.connections_max)
        self._idle: deque[HttpConnection] = deque()
        self._open: set[HttpConnection] = set()
        self._sweep: asyncio.TimerHandle | None = None
        self._closed = False

    async def post(
        self, path: str, headers: Mapping[str, str], body: bytes, *, within_s: float
    ) -> HttpResponse:
        """Send, and wait for status and headers. The caller has to close the response.

        ``within_s`` holds from here to the response's end, unless its ``until`` is moved. Nothing
        is sent twice: a kept connection that turns out to be closed is an error, because the other
        side may have read the request.

        Raises:
            PoolFull: all connections were in use, and none came free within half of that time.
            ConnectTimeout: no connection in time.
            TimeoutError: no status and headers in time.
            OSError: no connection, or it ended before an answer.
        """
        until_s = self._loop.time() + within_s
        request = self._head(path, headers, len(body)) + body
        await self._take_place(within_s / 2)
        response: HttpResponse | None = None
        try:
            connection = self._kept() or await self._connect(until_s)
            response = connection.send(request)
            response.until(until_s)
            await response.head()
        except BaseException:  # also a cancelled caller's: no connection stays behind
            if response is not None:
                response.close()
            else:
                self._free.release()
            raise
        return response

    def close(self) -> None:
        """Cut every connection, those in use as well."""
        self._closed = True
        if self._sweep is not None:
            self._sweep.cancel()
            self._sweep = None
        self._idle.clear()
        for connection in tuple(self._open):
            connection.abort()

    def _head(self, path: str, headers: Mapping[str, str], length: int) -> bytes:
        if _NOT_IN_A_HEADER.search("\t".join(headers.values())):
            raise ValueError("a header holds a control character")
        sent = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        return (
            f"POST {self._path}/{path} HTTP/1.1\r\n{self._fixed_headers}{sent}"
            f"content-length: {length}\r\n\r\n"
        ).encode()

    async def _take_place(self, within_s: float) -> None:
        if not self._free.locked():
            await self._free.acquire()  # at once
            return
        try:
            async with asyncio.timeout(within_s):
                await self._free.acquire()
        except TimeoutError as error:
            raise PoolFull(within_s) from error

    def _kept(self) -> HttpConnection | None:
        """The connection that was used last, so that those beyond the need age and are closed."""
        oldest_s = self._loop.time() - self._limits.keepalive_s
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable and connection.idle_since_s > oldest_s:
                return connection
            connection.abort()
        return None

    async def _connect(self, until_s: float) -> HttpConnection:
        if self._closed:
            raise ConnectionAbortedError("the pool is closed")
        connection = HttpConnection(self._loop, free=self._on_free, lost=self._open.discard)
        self._open.add(connection)
        limit_s = self._limits.connect_timeout_ms / 1000.0
        own_limit = self._loop.time() + limit_s < until_s
        try:
            async with asyncio.timeout(limit_s) if own_limit else asyncio.timeout_at(until_s):
                addresses = await self._loop.getaddrinfo(
                    self._host, self._port, type=socket.SOCK_STREAM
                )
                opened = await start_connection(
                    addresses, happy_eyeballs_delay=_NEXT_ADDRESS_S, loop=self._loop
                )
                await self._loop.create_connection(
                    lambda: connection,
                    sock=opened,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls else None,
                )
        except BaseException as error:
            self._open.discard(connection)
            if own_limit and isinstance(error, TimeoutError):
                raise ConnectTimeout(f"no connection within {limit_s} s") from error
            raise
        return connection

    def _on_free(self, connection: HttpConnection) -> None:
        self._free.release()
        if connection.reusable:
            connection.idle_since_s = self._loop.time()
            self._idle.append(connection)
            if self._sweep is None:
                self._sweep = self._loop.call_later(self._limits.keepalive_s, self._drop_aged)

    def _drop_aged(self) -> None:
        oldest_s = self._loop.time() - self._limits.keepalive_s
        while self._idle and self._idle[0].idle_since_s <= oldest_s:
            self._idle.popleft().abort()
        self._sweep = (
            self._loop.call_later(self._limits.keepalive_s, self._drop_aged) if self._idle else None
        )
