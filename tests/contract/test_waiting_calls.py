"""A call that waits at a busy host goes to one that has fallen idle: real hosts, real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from deployments.choose_host import MOVES_MAX
from deployments.host_directory import add_dispatched
from deployments.host_record import HostRecord
from experts.protocol import ExpertCall
from experts.types import Capability, Endpoint, ExpertSpec, Price, SourceKind
from gateway.backends import BackendPool
from gateway.caller import Caller
from gateway.journal import StageNote
from tests.contract.gateway_kit import eventually, served
from tests.contract.host_kit import PATIENT, TOKEN, Slot


class Cluster:
    """Hosts, and a directory that lists them when it is told to."""

    def __init__(self, urls: dict[str, str], slots: dict[str, Slot]) -> None:
        self.urls, self.slots = urls, slots
        self.listed: dict[str, HostRecord] = {}
        self.sent: dict[str, dict[str, int]] = {}
        self.pool = BackendPool(
            directory=self, host_token=lambda: TOKEN, secret=lambda _: None, wall_ms=lambda: 1_000
        )
        self.caller = Caller(self.pool)
        self.work = {name: AsyncExitStack() for name in slots}
        self.list_hosts()

    def list_hosts(self) -> None:
        self.listed = {name: self.record(name) for name in self.slots}
        self.sent.clear()
        self.pool.move_waiting()

    def record(self, name: str) -> HostRecord:
        shown = self.slots[name].driver.snapshot()
        return HostRecord(
            name,
            self.urls[name],
            ("a", "b"),
            resident=shown.resident,
            queue_depths=shown.queued,
            in_flight=shown.in_flight,
            swap_ms={"a": 1_000.0, "b": 1_000.0},
            slot_state=shown.phase.value,
            heartbeat_ms=1_000,
        )

    def hosts_for(self, expert: str) -> list[HostRecord]:
        return [add_dispatched(r, self.sent.get(n, {})) for n, r in self.listed.items()]

    def mark_suspect(self, host_id: str, until_ms: float) -> None:
        raise AssertionError(f"{host_id} has done nothing wrong")

    def note_dispatched(self, host_id: str, expert: str) -> None:
        sent = self.sent.setdefault(host_id, {})
        sent[expert] = sent.get(expert, 0) + 1

    async def occupy(self, name: str) -> None:
        """Work for expert a that goes on until ``frees``."""
        lease = self.slots[name].driver.lease("a", request_id="work")
        await self.work[name].enter_async_context(lease)

    async def frees(self, name: str) -> None:
        await self.work[name].aclose()
        self.list_hosts()

    # --- callers

    def ask(self, expert: str, *script: str) -> asyncio.Task[str]:
        return asyncio.create_task(self._whole(expert, script))

    def open_stream(self, expert: str, *script: str) -> asyncio.Task[str]:
        return asyncio.create_task(self._streamed(expert, script))

    async def _whole(self, expert: str, script: tuple[str, ...]) -> str:
        self.note = StageNote(expert, 0.0)
        reply = await self.caller.complete(spec(expert), call(expert, script), self.note)
        text: str = reply.body["choices"][0]["message"]["content"]
        return text

    async def _streamed(self, expert: str, script: tuple[str, ...]) -> str:
        note = StageNote(expert, 0.0)
        opened, batches, first = await self.caller.open(spec(expert), call(expert, script), note)
        chunks = [*first, *[chunk async for batch in batches for chunk in batch]]
        await opened.stack.aclose()
        return str(len(chunks))

    async def queued(self, name: str, count: int) -> None:
        driver = self.slots[name].driver
        await eventually(lambda: sum(driver.snapshot().queued.values()) == count)


def spec(expert: str) -> ExpertSpec:
    chat = frozenset({Capability.CHAT})
    return ExpertSpec(expert, SourceKind.WEIGHTS, "/x", Price(), 1024, chat)


def call(expert: str, script: tuple[str, ...]) -> ExpertCall:
    body = {"messages": [{"role": "user", "content": "hi"}], "script": script or ("hello",)}
    return ExpertCall(expert, Endpoint.CHAT, body, "r", 30e3, 30e3, 30e3)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    """Two hosts, both busy with expert a."""
    slots = {name: Slot(PATIENT) for name in ("one", "two")}
    async with AsyncExitStack() as stack:
        urls = {}
        for name, slot in slots.items():
            await slot.driver.start()
            stack.push_async_callback(slot.driver.aclose)
            urls[name] = await stack.enter_async_context(served(slot.app))
        cluster = Cluster(urls, slots)
        stack.push_async_callback(cluster.pool.aclose)
        for name in slots:
            await cluster.occupy(name)
        cluster.list_hosts()
        yield cluster
        for name in slots:
            await cluster.work[name].aclose()


@pytest.mark.parametrize("way", ["ask", "open_stream"])
async def test_what_waits_moves_to_the_host_that_falls_idle(cluster: Cluster, way: str) -> None:
    """All of one expert together, and nothing is left behind where they waited."""
    waiting = [getattr(cluster, way)("b") for _ in range(3)]
    await cluster.queued("one", 3)
    cluster.list_hosts()
    await cluster.queued("one", 3)  # nobody is idle, nobody moves
    await cluster.frees("two")
    assert len(set(await bounded(asyncio.gather(*waiting)))) == 1
    assert cluster.slots["two"].engine.calls == ["b", "b", "b"]
    assert cluster.slots["one"].engine.calls == []
    await cluster.queued("one", 0)


async def test_the_time_at_the_first_host_counts_as_waiting(cluster: Cluster) -> None:
    waiting = cluster.ask("b")
    await cluster.queued("one", 1)
    began_s = asyncio.get_running_loop().time()
    await cluster.frees("two")
    waited_ms = (asyncio.get_running_loop().time() - began_s) * 1e3
    assert await bounded(waiting) == "hello"
    assert cluster.note.queue_ms >= waited_ms
    assert cluster.note.moves == 1


async def test_what_runs_is_never_moved(cluster: Cluster) -> None:
    for _ in range(2):  # so that it is the other host that is asked for more
        await cluster.occupy("two")
    running = cluster.ask("a", "wait", "done")
    engine = cluster.slots["one"].engine
    await eventually(lambda: engine.running == ["a"])
    cluster.list_hosts()
    waiting = cluster.ask("b")
    await cluster.queued("one", 1)
    await cluster.frees("two")
    assert await bounded(waiting) == "hello"
    assert engine.running == ["a"]
    engine.go.set()
    assert await bounded(running) == "done"
    assert engine.aborted == []


async def test_a_caller_who_hangs_up_is_gone_everywhere(cluster: Cluster) -> None:
    waiting = cluster.ask("b")
    await cluster.queued("one", 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await cluster.queued("one", 0)
    await cluster.frees("two")
    assert cluster.slots["two"].engine.calls == []


async def test_a_call_moves_only_so_often(cluster: Cluster) -> None:
    """Idle on the list and busy in truth, again and again: then it stays where it is."""
    waiting = cluster.ask("b")
    await cluster.queued("one", 1)
    places = ["one"]
    for _ in range(MOVES_MAX + 1):
        here = places[-1]
        there = "two" if here == "one" else "one"
        cluster.listed[here] = cluster.record(here)
        cluster.listed[there] = HostRecord(
            there, cluster.urls[there], ("a", "b"), resident="a", heartbeat_ms=1_000
        )
        cluster.sent.clear()
        cluster.pool.move_waiting()
        places.append(there)
        if len(places) <= MOVES_MAX + 1:
            await cluster.queued(there, 1)
            await cluster.queued(here, 0)
    await cluster.queued(places[MOVES_MAX], 1)
    await cluster.frees(places[MOVES_MAX])
    assert await bounded(waiting) == "hello"


async def bounded(work: Any) -> Any:
    async with asyncio.timeout(30):
        return await work
