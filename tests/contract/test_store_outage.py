"""A store that dies, hangs or comes back: bounded waiting, one log line per change."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from deployments.host_directory import HostDirectory
from deployments.registry import HostRecord, HostRegistry
from deployments.store import StateStore
from experts.errors import StateUnavailable
from gateway.state.decisions import DecisionLog

pytestmark = pytest.mark.valkey

TIMEOUT_MS = 1_000.0  # far more than a server needs that is only slow, and less than twice


async def failed_after_ms(call: Callable[[], Awaitable[Any]]) -> float:
    """How long the call took to raise StateUnavailable."""
    began = time.perf_counter()
    with pytest.raises(StateUnavailable):
        await call()
    return (time.perf_counter() - began) * 1000


async def until(holds: Callable[[], Awaitable[bool]], within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not await holds():  # noqa: ASYNC110 - another process is awaited
            await asyncio.sleep(0.01)


async def answers(store: StateStore) -> bool:
    try:
        await store.ping()
    except StateUnavailable:
        return False
    return True


async def test_killed_server_is_noticed_at_once_and_found_again_on_the_same_port(
    plain_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store = StateStore(plain_server.url, timeout_ms=TIMEOUT_MS)
    await store.ping()
    plain_server.kill()
    took_ms = await failed_after_ms(store.ping)
    refused_ms = [await failed_after_ms(store.ping) for _ in range(20)]
    assert took_ms < 2 * TIMEOUT_MS
    assert max(refused_ms) < TIMEOUT_MS / 2
    assert not store.available
    plain_server.start()
    await until(lambda: answers(store))
    assert store.available
    await store.aclose()
    lines = [r.message for r in caplog.records if r.levelno >= logging.WARNING]
    assert [("is away" in line, "is back" in line) for line in lines] == [
        (True, False),
        (False, True),
    ]


async def test_hung_server_costs_one_timeout_and_not_one_per_call(plain_server: Any) -> None:
    store = StateStore(plain_server.url, timeout_ms=TIMEOUT_MS)
    await asyncio.gather(*(store.ping() for _ in range(8)))  # idle connections that will hang too
    plain_server.send(signal.SIGSTOP)
    began = time.perf_counter()
    outcomes = await asyncio.gather(
        *(failed_after_ms(store.ping) for _ in range(50)), return_exceptions=True
    )
    assert (time.perf_counter() - began) * 1000 < 2 * TIMEOUT_MS
    assert all(isinstance(outcome, float) for outcome in outcomes)
    assert await failed_after_ms(store.ping) < TIMEOUT_MS / 2
    plain_server.send(signal.SIGCONT)
    await until(lambda: answers(store))
    assert await asyncio.gather(*(answers(store) for _ in range(50))) == [True] * 50
    await store.aclose()


class Forwarder:
    """A TCP hop in front of a server whose open connections can all go silent, as when a firewall
    forgets them; new ones work."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._silent: set[int] = set()
        self._open: set[int] = set()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def silence_open_connections(self) -> int:
        self._silent |= self._open
        return len(self._silent)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(self._open)
        self._open.add(number)
        upstream = await asyncio.open_connection("127.0.0.1", self._port)
        for source, sink in ((reader, upstream[1]), (upstream[0], writer)):
            self._tasks.add(asyncio.create_task(self._pump(number, source, sink)))

    async def _pump(
        self, number: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        try:
            while data := await source.read(65_536):
                if number not in self._silent:
                    sink.write(data)
        finally:
            sink.close()


async def test_dead_idle_connections_are_not_tried_one_by_one(plain_server: Any) -> None:
    hop = Forwarder(plain_server.port)
    async with hop as url:
        store = StateStore(url, timeout_ms=TIMEOUT_MS)
        await asyncio.gather(*(store.ping() for _ in range(8)))
        assert hop.silence_open_connections() == 8
        await failed_after_ms(store.ping)
        await asyncio.sleep(0.5)  # the first back-off
        assert await answers(store)
        assert await asyncio.gather(*(answers(store) for _ in range(8))) == [True] * 8
        await store.aclose()


async def test_address_that_accepts_and_says_nothing_is_given_up_in_time() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        store = StateStore(f"redis://:pw@127.0.0.1:{silent.getsockname()[1]}", timeout_ms=300)
        assert await failed_after_ms(store.ping) < 900
        await store.aclose()


async def test_scripts_work_after_a_restart_that_forgot_them(plain_server: Any) -> None:
    store = StateStore(plain_server.url, timeout_ms=TIMEOUT_MS)
    store.add_script("one", "return 1")
    assert await store.eval_script("one", [], []) == 1
    plain_server.kill()
    await failed_after_ms(store.ping)
    plain_server.start()
    await until(lambda: answers(store))
    assert await store.eval_script("one", [], []) == 1
    await store.aclose()


async def test_directory_keeps_its_hosts_through_an_outage_that_lost_all_data(
    plain_server: Any,
) -> None:
    store = StateStore(plain_server.url, timeout_ms=TIMEOUT_MS)
    registry = HostRegistry(store)
    record = HostRecord("h1", "http://127.0.0.1:1", ("a",))
    await registry.publish(record, 3_000)
    directory = HostDirectory(registry, refresh_ms=20, min_refresh_ms=0)
    await directory.start()
    assert (directory.stale, directory.hosts_for("a")) == (False, [record])
    plain_server.kill()
    await until(_is(lambda: directory.stale))
    assert directory.hosts_for("a") == [record]
    plain_server.start()
    await until(_is(lambda: not directory.stale))
    assert await registry.list_live() == []  # the host has not registered again yet
    assert directory.hosts_for("a") == [record]
    await directory.aclose()
    await store.aclose()


async def test_decisions_wait_for_the_store_and_are_written_when_it_is_back(
    plain_server: Any,
) -> None:
    store = StateStore(plain_server.url, timeout_ms=TIMEOUT_MS)
    decisions = DecisionLog(store, queue_records=3)
    decisions.start()
    plain_server.kill()
    await failed_after_ms(store.ping)
    for n in range(5):
        decisions.append({"decision_id": str(n)})
    assert (decisions.queued, decisions.dropped) == (3, 2)
    plain_server.start()
    await until(_is(lambda: decisions.queued == 0))
    assert [r["decision_id"] for r in await decisions.tail(9)] == ["4", "3", "2"]
    await decisions.aclose()
    await store.aclose()


def _is(holds: Callable[[], bool]) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return holds()

    return check
