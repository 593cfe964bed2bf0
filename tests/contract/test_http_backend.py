"""HttpBackend against a server that says exactly what a test wants, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from experts.errors import (
    CoeError,
    DeadlineUnreachable,
    ExpertFailed,
    ExpertOutOfService,
    HostLost,
    HostUnavailable,
    UpstreamTimeout,
)
from experts.http_backend import HttpBackend, PoolLimits
from gateway.http_errors import answer_for
from tests.contract.test_backend_contract import call

SSE_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-coe-queue-ms: junk\r\n"
    b"connection: close\r\n\r\n"
)
CHUNK = b'data: {"choices":[{"delta":{"content":"caf\xc3\xa9"},"finish_reason":null}]}\n\n'
LAST = b'data: {"choices":[{"delta":{},"finish_reason": "stop"}]}\n\n'


class Wire:
    """A one-answer TCP server: sends ``pieces``, then closes or hangs."""

    def __init__(
        self, *pieces: bytes, hang: bool = False, repeat: bytes = b"", every_ms: float = 0.0
    ) -> None:
        self.pieces = pieces
        self.hang = hang
        self.repeat, self.every_ms = repeat, every_ms
        self.head = b""
        self.closed = asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await self._answer(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        self.closed.set()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.head = head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        await reader.readexactly(length)
        for piece in self.pieces:
            writer.write(piece)
            await writer.drain()
        while self.repeat and not reader.at_eof():
            writer.write(self.repeat)
            await writer.drain()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), self.every_ms / 1000)
        if self.hang:
            await reader.read()  # until the client closes


@asynccontextmanager
async def connected(wire: Wire, **options: Any) -> AsyncIterator[HttpBackend]:
    server = await asyncio.start_server(wire.answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    backend = HttpBackend(f"http://127.0.0.1:{port}/v1", **options)
    try:
        yield backend
    finally:
        await backend.aclose()
        await wire.closed.wait()  # its socket must not outlive the test
        server.close()
        await server.wait_closed()


async def payloads(backend: HttpBackend, **changes: Any) -> list[bytes]:
    async with backend.stream(call(**changes)) as stream:
        return [payload async for payload in stream]


async def test_events_cut_at_every_byte_arrive_whole() -> None:
    raw = b": hello\r\n\r\n" + CHUNK.replace(b"\n", b"\r\n") + LAST + b"data: [DONE]\n\n"
    async with connected(Wire(SSE_HEAD, *(raw[i : i + 1] for i in range(len(raw))))) as backend:
        assert await payloads(backend) == [CHUNK[6:-2], LAST[6:-2]]


@pytest.mark.parametrize("ending", [[CHUNK], [CHUNK, b'data: {"choi'], []])
async def test_a_truncated_stream_is_an_error(ending: list[bytes]) -> None:
    async with connected(Wire(SSE_HEAD, *ending)) as backend:
        with pytest.raises(HostLost) as error:
            await payloads(backend)
    assert error.value.sent_tokens == min(1, len(ending))


async def test_a_finish_reason_ends_a_stream_without_done() -> None:
    async with connected(Wire(SSE_HEAD, CHUNK, LAST)) as backend:
        assert len(await payloads(backend)) == 2


async def test_an_error_event_is_raised() -> None:
    event = b'data: {"error": {"message": "kv cache full", "code": 507, "param": "n"}}\n\n'
    async with connected(Wire(SSE_HEAD, CHUNK, event)) as backend:
        with pytest.raises(ExpertFailed) as error:
            await payloads(backend)
    assert (error.value.status, error.value.detail, error.value.param) == (
        507,
        "kv cache full",
        "n",
    )


async def test_the_word_error_in_a_text_is_no_error() -> None:
    chunk = b'data: {"choices":[{"delta":{"content":"say \\"error\\""},"error":null}]}\n\n'
    async with connected(Wire(SSE_HEAD, chunk, LAST)) as backend:
        assert len(await payloads(backend)) == 2


def refusal(status: int, body: bytes, extra: bytes = b"") -> bytes:
    head = b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n%b" % (status, len(body), extra)
    return head + b"connection: close\r\n\r\n" + body


@pytest.mark.parametrize(
    ("status", "body", "kind", "fields"),
    [
        (503, b'{"error":{"code":"deadline_unreachable","wait_ms":7,"deadline_ms":5}}',
         DeadlineUnreachable, {"wait_ms": 7.0, "deadline_ms": 5.0}),
        (503, b'{"error":{"code":"host_draining"}}', HostUnavailable, {"retry_after_ms": 3000.0}),
        (503, b'{"error":{"code":"expert_out_of_service","reason":"canary"}}',
         ExpertOutOfService, {"reason": "canary"}),
        (503, b"<html>busy</html>", ExpertFailed, {"status": 503, "detail": "<html>busy</html>"}),
        (401, b'{"error":{"message":"bad key sk-secret"}}', ExpertFailed, {"status": 401}),
        (400, b'{"object":"error","message":"too long","code":400}', ExpertFailed,
         {"detail": "too long", "error_code": "400"}),
        (302, b"", ExpertFailed, {"status": 302}),
    ],
)  # fmt: skip
async def test_refusals_become_the_error_they_stand_for(
    status: int, body: bytes, kind: type[CoeError], fields: dict[str, Any]
) -> None:
    extra = b"retry-after: 3\r\nlocation: http://127.0.0.1:1/\r\n"
    async with connected(Wire(refusal(status, body, extra))) as backend:
        with pytest.raises(kind) as error:
            await backend.complete(call())
    assert {name: getattr(error.value, name) for name in fields} == fields
    assert "sk-secret" not in str(error.value)


@pytest.mark.parametrize(
    ("pieces", "limits", "phase"),
    [
        ([], {"first_token_timeout_ms": 200}, "first token"),
        ([SSE_HEAD], {"first_token_timeout_ms": 200}, "first token"),
        ([SSE_HEAD, CHUNK], {"idle_timeout_ms": 100}, "between tokens"),
        ([SSE_HEAD, CHUNK], {"timeout_ms": 1_000, "first_token_timeout_ms": 1_000}, "total"),
    ],
)
async def test_each_phase_has_its_own_limit(
    pieces: list[bytes], limits: dict[str, float], phase: str
) -> None:
    wire = Wire(*pieces, hang=True)
    async with connected(wire) as backend:
        with pytest.raises(UpstreamTimeout) as error:
            await payloads(backend, **limits)
        assert error.value.phase == phase
        async with asyncio.timeout(30):
            await wire.closed.wait()  # the generation was cut off, not left running


async def test_a_reply_beyond_the_bound_is_not_read_to_its_end() -> None:
    wire = Wire(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n", b"x" * 5_000, hang=True)
    async with connected(wire, limits=PoolLimits(reply_bytes_max=1_000)) as backend:
        with pytest.raises(ExpertFailed):
            await backend.complete(call())


@pytest.mark.parametrize("event", [b"data: <html>\n\n", b"data: []\n\n"])
async def test_an_event_that_is_no_object_is_an_error(event: bytes) -> None:
    async with connected(Wire(SSE_HEAD, event, LAST)) as backend:
        with pytest.raises(ExpertFailed):
            await payloads(backend)


async def test_blank_events_and_spaces_are_passed_over() -> None:
    spaced = CHUNK.replace(b"data: ", b"data:   ")
    async with connected(Wire(SSE_HEAD, b"data:  \n\n", spaced, LAST)) as backend:
        assert [one[:1] for one in await payloads(backend)] == [b"{", b"{"]


@pytest.mark.parametrize("reply", [b"[]", b"no json", b'{"choices":"x"}', b'{"choices":[null]}'])
async def test_a_reply_that_is_no_object_is_an_error(reply: bytes) -> None:
    async with connected(Wire(refusal(200, reply))) as backend:
        with pytest.raises(ExpertFailed):
            await backend.complete(call())


async def test_nobody_listening_is_a_lost_host(caplog: pytest.LogCaptureFixture) -> None:
    backend = HttpBackend("http://127.0.0.1:9/v1", host="h", secret=lambda: "s3cret")
    try:
        for _ in range(3):
            with pytest.raises(HostLost) as error:
                await backend.complete(call())
    finally:
        await backend.aclose()
    assert error.value.host == "h"
    (line,) = caplog.messages  # the operator is told why, once
    assert "ConnectionRefusedError" in line
    assert "s3cret" not in line


async def test_comments_are_no_answer_and_end_no_wait() -> None:
    """Pain 13: a server that only says it is at work is late like one that says nothing."""
    server = Wire(SSE_HEAD, hang=True, every_ms=20.0, repeat=b": still at work\n\n")
    async with connected(server) as backend:
        with pytest.raises(UpstreamTimeout) as late:
            await payloads(backend, first_token_timeout_ms=150.0, timeout_ms=5_000.0)
    assert late.value.phase == "first token"
    server = Wire(SSE_HEAD, CHUNK, hang=True, every_ms=20.0, repeat=b": still at work\n\n")
    async with connected(server) as backend:
        with pytest.raises(UpstreamTimeout) as late:
            await payloads(backend, idle_timeout_ms=150.0, timeout_ms=5_000.0)
    assert late.value.phase == "between tokens"


async def test_a_refusal_whose_text_is_cut_is_still_that_refusal() -> None:
    """Pain 14: a client's mistake must not look like a host that is lost."""
    cut = refusal(400, b'{"error": {"message": "too long"}}').replace(b"length: ", b"length: 9")
    async with connected(Wire(cut)) as backend:
        with pytest.raises(ExpertFailed) as refused:
            await backend.complete(call())
    assert (refused.value.status, refused.value.detail) == (400, "too long")


async def test_a_busy_upstream_tells_how_long_to_wait() -> None:
    busy = refusal(429, b'{"error": {"message": "slow down"}}', b"retry-after: 7\r\n")
    async with connected(Wire(busy)) as backend:
        with pytest.raises(ExpertFailed) as refused:
            await backend.complete(call())
    answer = answer_for(refused.value)
    assert (answer.status, dict(answer.headers)[b"retry-after"]) == (503, b"7")
    assert b"expert_busy" in answer.body


@pytest.mark.parametrize("ending", [b"data: [DONE]", LAST.rstrip()])
async def test_a_last_event_without_a_blank_line_counts_if_it_is_whole(ending: bytes) -> None:
    async with connected(Wire(SSE_HEAD, CHUNK, ending)) as backend:
        assert len(await payloads(backend)) == (1 if b"DONE" in ending else 2)


async def test_a_secret_from_a_file_may_end_with_a_line_feed() -> None:
    wire = Wire(refusal(418, b"{}"))
    async with connected(wire, secret=lambda: "s3cret\n") as backend:
        with pytest.raises(ExpertFailed):
            await backend.complete(call())
    assert b"authorization: Bearer s3cret\r\n" in wire.head
