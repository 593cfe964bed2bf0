"""HttpConnection over a transport that only takes notes: every byte is the test's."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.http_connection import (
    BUFFER_BYTES_HIGH,
    FRAMING_BYTES_MAX,
    HttpConnection,
    HttpResponse,
    UpstreamProtocolError,
)

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: 1\r\nx-a: 2\r\n\r\n"
    b"3\r\nabc\r\n4\r\ndefg\r\n0\r\nx-trailer: late\r\n\r\n"
)


class Notes:
    """An asyncio transport's methods."""

    def __init__(self) -> None:
        self.sent = b""
        self.unsent_bytes = 0
        self.calls: list[str] = []

    def write(self, data: bytes) -> None:
        self.sent += data

    def is_closing(self) -> bool:
        return "abort" in self.calls

    def get_write_buffer_size(self) -> int:
        return self.unsent_bytes

    def __getattr__(self, name: str) -> Any:
        return lambda: self.calls.append(name)


class Bench:
    def __init__(self) -> None:
        self.freed: list[HttpConnection] = []
        self.lost: list[HttpConnection] = []
        self.transport = Notes()
        self.connection = HttpConnection(
            asyncio.get_running_loop(), free=self.freed.append, lost=self.lost.append
        )
        self.connection.connection_made(self.transport)  # type: ignore[arg-type]

    def ask(self) -> HttpResponse:
        return self.connection.send(b"POST / HTTP/1.1\r\n\r\n")

    def answer(self, *pieces: bytes) -> HttpResponse:
        response = self.ask()
        for piece in pieces:
            self.connection.data_received(piece)
        return response

    @property
    def aborted(self) -> bool:
        return "abort" in self.transport.calls


@pytest.fixture
async def bench() -> Bench:
    return Bench()


async def whole(response: HttpResponse) -> bytes:
    await response.head()
    body = b""
    while piece := await response.read():
        body += piece
    return body


async def test_a_connection_serves_one_request_after_another(bench: Bench) -> None:
    for _ in range(3):
        response = bench.answer(OK)
        assert (await whole(response), response.status) == (b"hi", 200)
        response.close()
        response.close()
    assert bench.freed == [bench.connection] * 3
    assert bench.connection.reusable
    assert not bench.aborted


@given(st.lists(st.integers(1, len(CHUNKED) - 1), max_size=20))
def test_an_answer_is_the_same_however_it_is_cut(cuts: list[int]) -> None:
    async def run() -> None:
        edges = [0, *sorted(set(cuts)), len(CHUNKED)]
        pieces = (CHUNKED[a:b] for a, b in pairwise(edges))
        bench = Bench()
        response = bench.answer(*pieces)
        assert await whole(response) == b"abcdefg"
        assert response.headers == {"transfer-encoding": "chunked", "x-a": "1, 2"}
        response.close()
        assert bench.connection.reusable

    asyncio.run(run())


async def test_an_interim_answer_is_passed_over(bench: Bench) -> None:
    response = bench.answer(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK)
    assert await whole(response) == b"hi"
    assert (response.status, response.headers) == (200, {"content-length": "2"})


async def test_the_end_of_the_connection_ends_a_body_without_a_length(bench: Bench) -> None:
    response = bench.answer(b"HTTP/1.1 200 OK\r\n\r\nhi", b"gh")
    bench.connection.connection_lost(None)
    assert await whole(response) == b"high"
    response.close()
    assert not bench.connection.reusable
    assert bench.lost == [bench.connection]


@pytest.mark.parametrize(
    ("sent", "exc"),
    [
        (b"", None),
        (b"HTTP/1.1 200 OK\r\ncontent-le", None),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nhi", None),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n", None),
        (b"HTTP/1.1 200 OK\r\n\r\nhi", ConnectionResetError()),
    ],
)
async def test_a_connection_that_ends_too_soon_is_an_error(
    bench: Bench, sent: bytes, exc: Exception | None
) -> None:
    response = bench.answer(*([sent] if sent else []))
    bench.connection.connection_lost(exc)
    with pytest.raises(ConnectionResetError):
        await whole(response)
    with pytest.raises(ConnectionResetError):
        bench.ask()


@pytest.mark.parametrize(
    "sent",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 101 Switching\r\nupgrade: x\r\nconnection: upgrade\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n",
    ],
)
async def test_what_is_no_plain_answer_is_refused(bench: Bench, sent: bytes) -> None:
    response = bench.answer(sent)
    with pytest.raises(UpstreamProtocolError):
        await whole(response)
    assert bench.aborted


@pytest.mark.parametrize(
    "before", [b"HTTP/1.1 200 OK\r\n", CHUNKED.removesuffix(b"x-trailer: late\r\n\r\n")]
)
async def test_headers_or_trailers_without_end_are_refused(bench: Bench, before: bytes) -> None:
    line = b"x-filler: " + b"a" * 1000 + b"\r\n"
    response = bench.answer(before, *[line] * (FRAMING_BYTES_MAX // len(line) + 1))
    with pytest.raises(UpstreamProtocolError):
        await whole(response)
    assert bench.aborted


async def test_a_long_body_in_the_smallest_chunks_is_no_abuse(bench: Bench) -> None:
    pieces = [b"1\r\na\r\n" * 1000] * 100
    response = bench.answer(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", *pieces)
    bench.connection.data_received(b"0\r\n\r\n")
    assert await whole(response) == b"a" * 100_000


@pytest.mark.parametrize("flaw", ["closing", "unsent"])
async def test_what_cannot_carry_the_next_request_is_not_kept(bench: Bench, flaw: str) -> None:
    response = bench.answer(OK)
    assert await whole(response) == b"hi"
    if flaw == "closing":
        bench.transport.calls.append("abort")
    else:
        bench.transport.unsent_bytes = 1  # answered before it had been asked to the end
    assert not bench.connection.reusable
    response.close()
    assert bench.aborted


async def test_a_connection_that_is_given_up_while_it_opens_is_closed() -> None:
    notes, nobody = Notes(), lambda _connection: None
    connection = HttpConnection(asyncio.get_running_loop(), free=nobody, lost=nobody)
    connection.abort()
    connection.connection_made(notes)  # type: ignore[arg-type]
    assert notes.calls == ["abort"]


async def test_a_second_answer_is_not_taken_for_the_next_requests(bench: Bench) -> None:
    response = bench.answer(OK + OK.replace(b"hi", b"no"))
    assert await whole(response) == b"hi"
    response.close()
    assert bench.aborted
    assert not bench.connection.reusable


async def test_bytes_that_nobody_asked_for_close_the_connection(bench: Bench) -> None:
    response = bench.answer(OK)
    assert await whole(response) == b"hi"
    response.close()
    bench.connection.data_received(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
    assert not bench.connection.reusable


async def test_a_slow_reader_holds_the_sender_up(bench: Bench) -> None:
    piece = b"a" * 65536
    count = BUFFER_BYTES_HIGH // len(piece) + 1
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (len(piece) * (count + 1))
    response = bench.answer(head, *[piece] * count)
    assert bench.transport.calls == ["pause_reading"]
    assert await response.read() == piece * count
    assert bench.transport.calls == ["pause_reading", "resume_reading"]
    bench.connection.data_received(piece)
    assert await response.read() == piece
    assert await response.read() == b""


async def test_closing_early_cuts_the_connection_and_wakes_a_reader(bench: Bench) -> None:
    response = bench.answer(b"HTTP/1.1 200 OK\r\n\r\nhi")
    assert await response.read() == b"hi"
    reader = asyncio.ensure_future(response.read())
    await asyncio.sleep(0)
    response.close()
    bench.connection.connection_lost(None)  # no orderly end: it is ours
    with pytest.raises(ConnectionAbortedError):
        await reader
    assert bench.aborted
    assert bench.freed == [bench.connection]
