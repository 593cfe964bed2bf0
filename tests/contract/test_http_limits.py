"""Clients that send too much, too slowly, or never read: on real sockets, with small bounds."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn

from gateway.http_protocol import ConnectionLimits, protocol_with
from tests.contract.gateway_kit import EmbeddedServer, Gateway, eventually, make_gateway, spec

SMALL = ConnectionLimits(header_bytes=2_048, connections=3)
# Only for those who are to be late: on a busy machine anybody may be.
HASTY = replace(SMALL, header_timeout_ms=80, body_timeout_ms=80)
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
BODY = b'{"model":"echo","messages":[{"role":"user","content":"hello"}]}'
GET = b"GET /health/live HTTP/1.1\r\nhost: x\r\n\r\n"


def post(body: bytes) -> bytes:
    return HEAD + b"content-length: %d\r\n\r\n" % len(body) + body


@asynccontextmanager
async def limited(
    gateway: Gateway, limits: ConnectionLimits = SMALL
) -> AsyncIterator[tuple[str, int]]:
    async with limited_server(gateway, limits) as (address, _):
        yield address


@asynccontextmanager
async def limited_server(
    gateway: Gateway, limits: ConnectionLimits = SMALL
) -> AsyncIterator[tuple[tuple[str, int], EmbeddedServer]]:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8_192)  # connections inherit it
    server = EmbeddedServer(gateway.app)
    server.config = uvicorn.Config(
        gateway.app, http=protocol_with(limits), ws="none", loop="none", log_config=None
    )
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await server.ready.wait()
    try:
        yield listener.getsockname(), server
    finally:
        server.should_exit = True
        await task
        listener.close()


async def said(address: tuple[str, int], *pieces: bytes, pause_s: float = 0.0) -> bytes:
    """Everything that comes back until the server hangs up."""
    reader, writer = await asyncio.open_connection(*address)
    reading = asyncio.create_task(_read(reader))
    for piece in pieces:
        if reading.done():  # it has hung up: writing on would only provoke a reset
            break
        writer.write(piece)
        await asyncio.sleep(pause_s)
    async with asyncio.timeout(30):
        answer = await reading
    writer.close()
    return answer


async def _read(reader: asyncio.StreamReader) -> bytes:
    """To the end, also to one that is a reset because we were still writing."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := await reader.read(65_536):
            found += part
    return found


async def test_heads_and_bodies_have_a_size_and_a_time(tmp_path: Path) -> None:
    gateway = make_gateway(tmp_path, [spec("echo")])
    large = b"x-filler: " + b"a" * 3_000 + b"\r\n"
    async with limited(gateway) as address:
        for whole in (HEAD + large + b"\r\n", HEAD + large):  # complete, or not
            assert b"431 Request Header Fields Too Large" in await said(address, whole)
    async with limited(gateway, HASTY) as address:
        assert b"408 Request Timeout" in await said(address, HEAD)
        assert await said(address) == b""
        assert b"408 Request Timeout" in await said(address, post(BODY)[:-10])
        # Piece by piece, each in time, but not all of it. The answer may get lost in the reset.
        slow = [HEAD[n : n + 4] for n in range(0, len(HEAD), 4)]
        assert b"200" not in await said(address, *slow, post(BODY)[len(HEAD) :], pause_s=0.01)
    async with limited(gateway, replace(SMALL, header_timeout_ms=500)) as address:
        # Empty lines are no head either.
        answered = await said(address, GET, *[b"\r\n"] * 100, pause_s=0.01)
        assert answered.count(b"HTTP/1.1") == 1
        assert b"200 OK" in answered
    assert not gateway.scripted("echo").calls


async def test_what_frames_a_body_has_a_size_too(tmp_path: Path) -> None:
    """Trailers and chunk extensions are no part of the head, nor of the body."""
    gateway = make_gateway(tmp_path, [spec("echo")])
    chunked = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    fields = [b"x-filler: " + b"a" * 500 + b"\r\n"] * 12
    one_value = [b"x-filler: ", *[b"a" * 500] * 12]
    extension = [b"1;", *[b"a" * 500] * 12]
    async with limited(gateway) as address:
        for filler in ([b"0\r\n", *fields], [b"0\r\n", *one_value], extension):
            for pieces in ((chunked, *filler), (chunked + b"".join(filler),)):
                answered = await said(address, *pieces, pause_s=0.002)
                assert b"431 Request Header Fields Too Large" in answered
    assert not gateway.scripted("echo").calls


async def test_a_trailer_is_read_over(tmp_path: Path) -> None:
    """No header of the request may come after what decided over it."""
    seen: list[list[tuple[bytes, bytes]]] = []
    gateway = make_gateway(tmp_path, [spec("echo")])
    inner = gateway.app

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        await inner(scope, receive, send)
        if scope["type"] == "http":
            seen.append(list(scope["headers"]))

    gateway.app = noting
    head = HEAD.replace(b"host: x\r\n", b"host: x\r\nconnection: close\r\n")
    head += b"transfer-encoding: chunked\r\n\r\n"
    # More frame than a head may have bytes, but each byte of body brings its own.
    bytewise = b"".join(b"1\r\n%c\r\n" % byte for byte in b" " * 600 + BODY)
    pieces = (head, bytewise, b"0\r\nx-late: yes\r\n\r\n")
    async with limited(gateway) as address:
        answered = await said(address, *pieces, pause_s=0.002)
    assert b"200 OK" in answered
    assert [name for name, _ in seen[0] if name == b"x-late"] == []


async def test_the_refusals_are_in_the_shape_of_all_errors(tmp_path: Path) -> None:
    gateway = make_gateway(tmp_path, [spec("echo")])
    async with limited(gateway, HASTY) as address:
        late = await said(address, HEAD)
    async with limited(gateway) as address:
        garbled = await said(address, b"no HTTP at all\r\n\r\n")
    assert b'"error":{"message":"Request Timeout."' in late
    assert b'"code":"request_timeout"' in late
    assert garbled.startswith(b"HTTP/1.1 400 Bad Request")
    assert b"content-type: application/json" in garbled
    assert b'"code":"malformed_http"' in garbled


async def test_garbage_behind_a_request_does_not_garble_its_answer(tmp_path: Path) -> None:
    gateway = make_gateway(tmp_path, [spec("echo", "tokens?count=60&pace_ms=20")])
    body = BODY.replace(b"{", b'{"stream":true,', 1)
    async with limited(gateway) as address:
        # The answer is under way when the garbage comes: a second status line in the middle of a
        # stream would be read as a part of it.
        answered = await said(address, post(body), b"\0\0 garbage\r\n\r\n", pause_s=0.05)
    assert answered.count(b"HTTP/1.1 ") == 1
    assert b"[DONE]" not in answered


async def test_who_behaves_notices_nothing(tmp_path: Path) -> None:
    gateway = make_gateway(tmp_path, [spec("echo", "tokens?count=8&delay_ms=400")])
    hasty = replace(SMALL, header_timeout_ms=300, body_timeout_ms=300)
    close = post(BODY).replace(b"host: x\r\n", b"host: x\r\nconnection: close\r\n")
    async with limited(gateway, hasty) as address:
        # The answer takes longer than head and body may; two requests use one connection.
        answered = await said(address, post(BODY) + close)
    assert answered.count(b"200 OK") == 2


async def test_a_body_in_the_same_piece_is_no_head(tmp_path: Path) -> None:
    gateway = make_gateway(tmp_path, [spec("echo")])
    body, closing = BODY + b" " * 50_000, HEAD + b"connection: close\r\n"
    whole = closing + b"content-length: %d\r\n\r\n" % len(body) + body
    chunked = closing + b"transfer-encoding: chunked\r\n\r\n%x\r\n" % len(body)
    async with limited(gateway) as address:
        for sent in (whole, chunked + body + b"\r\n0\r\n\r\n"):
            assert b"200 OK" in await said(address, sent)


async def test_connections_have_a_number(tmp_path: Path) -> None:
    async with limited(make_gateway(tmp_path, [spec("echo")])) as address:
        held = [await asyncio.open_connection(*address) for _ in range(SMALL.connections)]
        assert b"503 Service Unavailable" in await said(address, GET)
        for _, writer in held:
            writer.close()


async def test_a_stream_that_nobody_reads_is_ended_at_the_expert_too(tmp_path: Path) -> None:
    gateway = make_gateway(
        tmp_path, [spec("echo", "tokens?count=40000&delay_ms=0", context_tokens=10**6)]
    )
    body = BODY.replace(b"{", b'{"stream":true,"max_tokens":30000,', 1)
    async with limited(gateway, replace(SMALL, stalled_write_ms=80)) as address:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        client.connect(address)
        client.sendall(post(body))
        await eventually(lambda: bool(gateway.journals))
        client.close()
    (journal,) = gateway.journals
    assert journal.outcome == "client_closed"
    assert 0 < journal.stages[0].usage.output_tokens < 30_000


async def test_who_has_just_connected_when_the_server_ends_is_still_answered(
    tmp_path: Path,
) -> None:
    """Pain 24: what the old worker accepted in its last moment is not lost with it."""
    gateway = make_gateway(tmp_path, [spec("echo", "echo")])
    async with limited_server(gateway, ConnectionLimits()) as (address, server):
        asked, silent = [await asyncio.open_connection(*address) for _ in range(2)]
        await eventually(lambda: len(server.server_state.connections) == 2)
        server.should_exit = True
        await eventually(lambda: not any(one.is_serving() for one in server.servers))
        asked[1].write(post(BODY))
        async with asyncio.timeout(30):
            answer = await _read(asked[0])
            assert await _read(silent[0]) == b"", "and is not waited for forever"
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"hello" in answer
    for _, writer in (asked, silent):
        writer.close()
