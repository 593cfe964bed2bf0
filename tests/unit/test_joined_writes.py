"""A response's head and body leave together; nothing is lost, reordered or kept waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.joined_writes import JoinedWrites

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


class Wire(asyncio.Transport):
    """Notes every system call that a transport would make."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []
        self.closed = self.aborted = False

    def write(self, data: Any) -> None:
        assert not self.closed, "written after the end"
        self.sent.append(bytes(data))

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.write(b"".join(list_of_data))

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 7


@pytest.fixture
async def joined() -> tuple[JoinedWrites, Wire]:
    wire = Wire()
    return JoinedWrites(wire, asyncio.get_running_loop()), wire


async def test_a_head_leaves_with_the_body_that_follows_it(
    joined: tuple[JoinedWrites, Wire],
) -> None:
    transport, wire = joined
    transport.write(HEAD)
    assert wire.sent == []
    assert transport.get_write_buffer_size() == len(HEAD) + 7
    transport.write(b"body")
    assert wire.sent == [HEAD + b"body"]
    await asyncio.sleep(0)
    transport.write(b"more")
    assert wire.sent == [HEAD + b"body", b"more"]


async def test_a_head_alone_leaves_at_the_end_of_the_turn(
    joined: tuple[JoinedWrites, Wire],
) -> None:
    transport, wire = joined
    transport.write(HEAD)
    await asyncio.sleep(0)
    assert wire.sent == [HEAD]


async def test_closing_sends_what_is_held_and_aborting_does_not(
    joined: tuple[JoinedWrites, Wire],
) -> None:
    transport, wire = joined
    transport.write(HEAD)
    transport.close()
    assert (wire.sent, wire.closed) == ([HEAD], True)
    await asyncio.sleep(0)  # the end of the turn finds nothing to send
    wire = Wire()
    transport = JoinedWrites(wire, asyncio.get_running_loop())
    transport.write(HEAD)
    transport.abort()
    await asyncio.sleep(0)
    assert (wire.sent, wire.aborted) == ([], True)


async def test_a_connection_that_was_lost_in_the_same_turn_is_not_written_to(
    joined: tuple[JoinedWrites, Wire],
) -> None:
    transport, wire = joined
    transport.write(HEAD)
    wire.closed = True
    await asyncio.sleep(0)
    assert wire.sent == []


@given(st.lists(st.sampled_from([HEAD, b"body", b"", b"HTTP/1.1 in a body", None])))
def test_bytes_keep_their_order(writes: list[bytes | None]) -> None:
    async def run() -> bytes:
        wire = Wire()
        transport = JoinedWrites(wire, asyncio.get_running_loop())
        for data in writes:
            if data is None:
                await asyncio.sleep(0)
            else:
                transport.write(data)
        transport.close()
        return b"".join(wire.sent)

    assert asyncio.run(run()) == b"".join(filter(None, writes))
