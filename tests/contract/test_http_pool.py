"""HttpPool over real sockets: what is kept, what is bounded, and what is never sent twice."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import pytest
import trustme
import uvloop

from experts import http_pool
from experts.http_connection import HttpResponse
from experts.http_pool import ConnectTimeout, HttpPool, PoolFull, PoolLimits
from tests.contract.gateway_kit import eventually

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"

Address = tuple[int, int, int, str, tuple[str, int]]
Talk = Callable[["Server", asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def answer_each(
    server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    while True:
        await server.request(reader)
        await server.may_answer.wait()
        writer.write(OK)


class Server:
    """Counts connections and requests; ``may_answer`` holds its answers back."""

    def __init__(self, talk: Talk = answer_each) -> None:
        self.connections = 0
        self.requests: list[bytes] = []
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.gone = asyncio.Semaphore(0)  # one permit for each connection that ended
        self._talk = talk

    async def request(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        self.requests.append(head + await reader.readexactly(length))
        self.asked.set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._talk(self, reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        self.gone.release()


@asynccontextmanager
async def pooled(
    server: Server,
    *,
    cert: ssl.SSLContext | None = None,
    trust: ssl.SSLContext | None = None,
    name: str = "127.0.0.1",
    **limits: float,
) -> AsyncIterator[HttpPool]:
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=cert)
    port = listening.sockets[0].getsockname()[1]
    url = f"{'https' if cert else 'http'}://{name}:{port}/v1/"
    pool = HttpPool(url, PoolLimits(**limits), tls=trust)  # type: ignore[arg-type]
    try:
        yield pool
    finally:
        pool.close()
        server.may_answer.set()
        while server.connections:  # their sockets must not outlive the test
            await server.gone.acquire()
            server.connections -= 1
        listening.close()
        await listening.wait_closed()


async def body_of(response: HttpResponse) -> bytes:
    parts = b""
    while part := await response.read():
        parts += part
    response.close()
    return parts


async def _post(pool: HttpPool, headers: Mapping[str, str], body: bytes) -> HttpResponse:
    return await pool.post("chat/completions", headers, body, within_s=60.0)


async def ask(pool: HttpPool, body: bytes = b"{}") -> bytes:
    return await body_of(await _post(pool, {"x-request-id": "r1"}, body))


async def test_a_request_is_written_as_it_should_be() -> None:
    server = Server()
    async with pooled(server) as pool:
        assert await ask(pool, b'{"a":1}') == b"hi"
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /v1/chat/completions HTTP/1.1"
    assert lines[1].startswith(b"host: 127.0.0.1:")
    assert {b"x-request-id: r1", b"content-length: 7", b"accept-encoding: identity"} < set(lines)
    assert body == b'{"a":1}'


async def test_one_connection_carries_many_requests_and_the_pool_is_bounded() -> None:
    server = Server()
    async with pooled(server, connections_max=3) as pool:
        for _ in range(5):
            await ask(pool)
        assert server.connections == 1
        assert await asyncio.gather(*(ask(pool) for _ in range(20))) == [b"hi"] * 20
        assert server.connections == 3


async def test_a_caller_that_leaves_takes_its_connection_with_it() -> None:
    server = Server()
    async with pooled(server, connections_max=1) as pool:
        server.may_answer.clear()
        first = asyncio.ensure_future(ask(pool))
        second = asyncio.ensure_future(ask(pool))  # waits for the first one's place
        await server.asked.wait()
        first.cancel()
        server.may_answer.set()
        assert await second == b"hi"
        assert first.cancelled()
        assert (server.connections, len(server.requests)) == (2, 2)


async def test_a_caller_that_leaves_the_queue_gives_no_place_away() -> None:
    server = Server()
    async with pooled(server, connections_max=1) as pool:
        server.may_answer.clear()
        first = asyncio.ensure_future(ask(pool))
        queued = asyncio.ensure_future(ask(pool))
        await server.asked.wait()
        queued.cancel()
        third = asyncio.ensure_future(ask(pool))
        server.may_answer.set()
        assert await asyncio.gather(first, third) == [b"hi", b"hi"]
        assert server.connections == 1


async def close_after_one(
    server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await server.request(reader)
    writer.write(OK)
    with contextlib.suppress(asyncio.IncompleteReadError):
        await server.request(reader)  # and no answer to this one


async def test_a_request_on_a_kept_connection_that_dies_is_not_sent_again() -> None:
    server = Server(close_after_one)
    async with pooled(server) as pool:
        assert await ask(pool) == b"hi"
        with pytest.raises(ConnectionResetError):
            await ask(pool)
        assert len(server.requests) == 2
        assert await ask(pool) == b"hi"  # the next one gets a connection of its own
        assert server.connections == 2


async def hang_up_when_idle(
    server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await server.request(reader)
    writer.write(OK)


async def test_a_connection_that_was_closed_while_idle_is_not_used() -> None:
    server = Server(hang_up_when_idle)
    async with pooled(server) as pool:
        assert await ask(pool) == b"hi"
        await server.gone.acquire()
        server.gone.release()
        await eventually(lambda: not pool._open)  # the news travels through the kernel
        assert await ask(pool) == b"hi"
        assert server.connections == 2


async def test_an_idle_connection_is_closed_in_time() -> None:
    server = Server()
    async with pooled(server, keepalive_s=0.05) as pool:
        await ask(pool)
        await asyncio.wait_for(server.gone.acquire(), 30)
        server.gone.release()
        assert await ask(pool) == b"hi"
        assert server.connections == 2


async def test_an_address_that_is_silent_does_not_hide_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, loop = Server(), asyncio.get_running_loop()
    found = loop.getaddrinfo

    async def silent_one_first(host: str, port: int, **more: int) -> list[Address]:
        reserved = await found("192.0.2.1", port, **more)  # RFC 5737: nobody is there
        return [*reserved, *await found(host, port, **more)]

    async with pooled(server) as pool:
        monkeypatch.setattr(loop, "getaddrinfo", silent_one_first)
        assert await ask(pool) == b"hi"


async def test_nobody_listening_and_a_pool_that_is_closed_are_connection_errors() -> None:
    server = Server()
    async with pooled(server) as pool:
        await ask(pool)
    for _ in range(2):
        with pytest.raises(ConnectionError):
            await ask(pool)


async def test_a_connection_that_does_not_come_about_has_its_own_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def never(*_: object, **__: object) -> None:
        await asyncio.Event().wait()

    pool = HttpPool("http://127.0.0.1:9/v1", PoolLimits(connect_timeout_ms=20.0))
    monkeypatch.setattr(http_pool, "start_connection", never)
    with pytest.raises(ConnectTimeout):
        await ask(pool)
    pool.close()


async def test_an_answer_that_does_not_begin_in_time_is_an_error_and_its_connection_is_cut() -> (
    None
):
    server = Server()
    async with pooled(server) as pool:
        server.may_answer.clear()
        with pytest.raises(TimeoutError):
            await pool.post("chat/completions", {}, b"{}", within_s=0.02)
        server.may_answer.set()
        assert await ask(pool) == b"hi"
        assert server.connections == 2


async def half_an_answer(
    server: Server, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    await server.request(reader)
    writer.write(OK[:-1])
    await server.may_answer.wait()
    writer.write(OK[-1:])
    await reader.read()


async def test_the_time_holds_to_the_end_of_the_answer_unless_it_is_lifted() -> None:
    server = Server(half_an_answer)
    async with pooled(server) as pool:
        server.may_answer.clear()
        bounded = await pool.post("chat/completions", {}, b"{}", within_s=0.5)
        patient = await pool.post("chat/completions", {}, b"{}", within_s=0.5)
        patient.until(None)
        assert (await bounded.read(), await patient.read()) == (b"h", b"h")
        with pytest.raises(TimeoutError):
            await bounded.read()
        server.may_answer.set()
        assert await body_of(patient) == b"i"
        bounded.close()


async def test_who_gets_no_connection_in_time_is_told_that_the_pool_is_full() -> None:
    server = Server()
    async with pooled(server, connections_max=1) as pool:
        server.may_answer.clear()
        first = asyncio.ensure_future(ask(pool))
        await server.asked.wait()
        with pytest.raises(PoolFull) as full:
            await pool.post("chat/completions", {}, b"{}", within_s=0.02)
        assert full.value.waited_s == 0.01, "whoever is asked has half of the time to answer"
        server.may_answer.set()
        assert await first == b"hi"
        assert await ask(pool) == b"hi"


@pytest.mark.parametrize("value", ["a\r\nx-evil: 1", "a\nb", "a\x00b"])
async def test_a_header_cannot_smuggle_another(value: str) -> None:
    server = Server()
    async with pooled(server) as pool:
        with pytest.raises(ValueError, match="control character"):
            await _post(pool, {"traceparent": value}, b"{}")
        assert await ask(pool) == b"hi"
    assert len(server.requests) == 1


@pytest.mark.parametrize("url", ["ftp://host/v1", "http:///v1", "host:80"])
async def test_only_http_and_https_are_spoken(url: str) -> None:
    with pytest.raises(ValueError, match="http or https"):
        HttpPool(url, PoolLimits())


def _tls(*names: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's certificate for ``names``, and the trust in who issued it."""
    authority = trustme.CA()
    cert = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(cert)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    return cert, trust


async def test_https_is_spoken_with_those_whose_certificate_is_trusted() -> None:
    cert, trust = _tls("localhost")
    server = Server()
    async with pooled(server, cert=cert, trust=trust, name="localhost") as pool:
        assert [await ask(pool), await ask(pool)] == [b"hi", b"hi"]
        assert server.connections == 1


@pytest.mark.parametrize("trusted", [True, False], ids=["another name", "an unknown authority"])
async def test_a_certificate_that_proves_nothing_is_refused(trusted: bool) -> None:
    cert, trust = _tls("elsewhere.example")
    async with pooled(Server(), cert=cert, trust=trust if trusted else None) as pool:
        with pytest.raises(ssl.SSLCertVerificationError):
            await ask(pool)


@pytest.mark.parametrize(
    "scenario",
    [
        test_a_request_is_written_as_it_should_be,
        test_one_connection_carries_many_requests_and_the_pool_is_bounded,
        test_a_caller_that_leaves_takes_its_connection_with_it,
        test_a_caller_that_leaves_the_queue_gives_no_place_away,
        test_a_request_on_a_kept_connection_that_dies_is_not_sent_again,
        test_a_connection_that_was_closed_while_idle_is_not_used,
        test_an_idle_connection_is_closed_in_time,
        test_nobody_listening_and_a_pool_that_is_closed_are_connection_errors,
        test_https_is_spoken_with_those_whose_certificate_is_trusted,
    ],
)
def test_it_is_the_same_on_the_loop_of_production(scenario: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await scenario()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
