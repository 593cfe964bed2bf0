"""Placement on real stores and over real sockets: the lease, the log, hosts that take commands."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest

from deployments.environment import TOKEN_ENV
from deployments.host import ExpertHost
from deployments.host_config import HostConfig
from deployments.host_directory import HostDirectory
from deployments.lease import StoreLease
from deployments.placement import Move, MoveKind
from deployments.placement_planner import MoveOutcome, PlacementPlanner, PlannerConfig
from deployments.registry import HostRegistry
from deployments.store import StateStore
from experts.engine_group import EngineGroup
from experts.errors import StateUnavailable
from gateway.config import load_config
from gateway.placement_client import HostCommands
from gateway.placement_task import PlacementTask
from gateway.state.moves import MOVES_KEPT, MoveLog, MoveRecord
from gateway.wiring import open_parts
from tests.contract.gateway_kit import eventually
from tests.contract.host_kit import TOKEN, PooledEngine

pytestmark = pytest.mark.valkey

Hosts = Mapping[str, tuple[ExpertHost, PooledEngine]]
FAST = PlannerConfig(half_life_ms=100, pause_ms=500)


# --- the lease ------------------------------------------------------------------------------------


async def test_of_two_that_want_the_lease_one_has_it(
    open_store: Callable[[], StateStore],
) -> None:
    one, two = (StoreLease(open_store(), "x", owner=name, ttl_ms=60_000) for name in "ab")
    assert await asyncio.gather(one.hold(), one.hold()) == [True, True]
    assert not await two.hold()
    assert (one.held, two.held) == (True, False)
    await two.release()  # not its own: left alone
    assert not await two.hold()
    assert await StoreLease(open_store(), "y", owner="b").hold(), "another lease"
    await one.release()
    assert not one.held
    assert await two.hold()
    assert not await one.hold()


async def test_a_holder_that_falls_silent_loses_the_lease_and_knows(store: StateStore) -> None:
    now_ms = [0.0]
    one = StoreLease(store, "x", owner="a", ttl_ms=50, clock_ms=lambda: now_ms[0])
    two = StoreLease(store, "x", owner="b", ttl_ms=60_000)
    assert await one.hold()
    now_ms[0] = 49.0
    assert one.held
    now_ms[0] = 50.0
    assert not one.held
    async with asyncio.timeout(30):
        while not await two.hold():  # noqa: ASYNC110 - the server expires it
            await asyncio.sleep(0.01)
    assert not await one.hold()


async def test_without_the_store_nobody_gets_the_lease() -> None:
    away = StateStore("redis://127.0.0.1:1/0", timeout_ms=200)
    lease = StoreLease(away, "x", owner="a")
    with pytest.raises(StateUnavailable):
        await lease.hold()
    assert not lease.held
    await away.aclose()


async def test_the_last_moves_are_kept_the_newest_first(
    open_store: Callable[[], StateStore],
) -> None:
    log = MoveLog(open_store())
    for number in range(MOVES_KEPT + 5):
        await log.append(MoveRecord(number, "pool", "h", "e", "done", "", 1.5))
    last = await MoveLog(open_store()).last()
    assert [move["ended_ms"] for move in last] == list(range(MOVES_KEPT + 4, 4, -1))
    assert last[0]["took_ms"] == 1.5


# --- hosts that take commands ---------------------------------------------------------------------


@pytest.fixture
async def hosts(
    store: StateStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[Hosts]:
    """Two hosts for a and b, with room for both; a is resident on the first, the other is empty."""
    engines = {"h1": PooledEngine("a", places=2), "h2": PooledEngine("", places=1)}
    engines["h1"].resident = "a"
    coming = iter(engines.values())

    async def start(*_: Any, **__: Any) -> tuple[PooledEngine, dict[str, str]]:
        return next(coming), {}

    monkeypatch.setattr(EngineGroup, "start", start)
    running: dict[str, tuple[ExpertHost, PooledEngine]] = {}
    for name, engine in engines.items():
        host = ExpertHost(
            host_id=name,
            config=HostConfig(name=name, experts=("a", "b")),
            locations={"a": str(tmp_path), "b": str(tmp_path)},
            registry=HostRegistry(store),
            token=TOKEN,
        )
        await host.start()
        running[name] = (host, engine)
    yield running
    for host, _ in running.values():
        await host.aclose()


async def command(host: ExpertHost, body: Any, token: str = TOKEN) -> httpx2.Response:
    async with httpx2.AsyncClient(base_url=host.url) as client:
        headers = {"authorization": f"Bearer {token}"}
        return await client.post("/placement", json=body, headers=headers)


async def test_a_host_takes_in_and_lets_go_by_command(hosts: Hosts) -> None:
    host, engine = hosts["h1"]
    for _ in range(2):
        reply = await command(host, {"kind": "pool", "expert": "b"})
        assert (reply.status_code, reply.json()["expert"]) == (200, "b")
    assert host.record().pooled == {"a", "b"}
    assert (host.record().pool_bytes, host.record().pooled_bytes) == (20, 20)
    for _ in range(2):
        assert (await command(host, {"kind": "evict", "expert": "b"})).status_code == 200
    assert engine.in_pool == {"a"}
    assert host.record().serves("b"), "it can still be asked for"
    refusal = await command(host, {"kind": "evict", "expert": "a"})
    error = refusal.json()["error"]
    assert (refusal.status_code, error["code"]) == (409, "placement_refused")
    assert error["reason"] == "it is resident"


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"kind": "pool"}, 400, "expert"),
        ({"expert": "a"}, 400, "kind"),
        ({"kind": "move", "expert": "a"}, 400, "kind"),
        ({"kind": "pool", "expert": 3}, 400, "expert"),
        ({"kind": "pool", "expert": "a", "force": True}, 400, "force"),
        ({"kind": "pool", "expert": "nobody"}, 404, "model"),
        ([], 400, None),
    ],
)
async def test_a_command_that_is_wrong_is_refused_by_field(
    hosts: Hosts, body: Any, status: int, param: str | None
) -> None:
    host, engine = hosts["h1"]
    reply = await command(host, body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
    assert engine.in_pool == {"a"}


async def test_only_who_has_the_token_commands(hosts: Hosts) -> None:
    host, engine = hosts["h1"]
    reply = await command(host, {"kind": "pool", "expert": "b"}, token="guess")
    assert reply.status_code == 401
    assert engine.in_pool == {"a"}


async def test_the_gateways_client_tells_outcomes_apart(hosts: Hosts) -> None:
    (host, _), right = hosts["h1"], HostCommands(token=lambda: TOKEN)
    wrong = HostCommands(token=lambda: None)
    pool, evict = (Move(kind, "h1", expert) for kind, expert in zip(MoveKind, "ba", strict=True))
    assert (await right.move(host.url, pool)).outcome is MoveOutcome.DONE
    refused = await right.move(host.url, evict)
    assert refused.outcome is MoveOutcome.REFUSED
    assert "it is resident" in refused.reason
    failed = await wrong.move(host.url, pool)
    assert failed.outcome is MoveOutcome.FAILED
    assert "token" in failed.reason
    nobody = await right.move("http://127.0.0.1:1", pool)
    assert nobody.outcome is MoveOutcome.FAILED
    for client in (right, wrong):
        await client.aclose()


class CountedMoves(MoveLog):
    """Tells when a move has wholly ended: a pool changes before its host has answered."""

    kept = 0

    async def append(self, move: MoveRecord) -> None:
        await super().append(move)
        self.kept += 1


class Worker:
    """One gateway worker's part in placement."""

    def __init__(self, store: StateStore, name: str) -> None:
        self.counted: list[tuple[str, str]] = []
        self.directory = HostDirectory(HostRegistry(store))
        self.commands = HostCommands(token=lambda: TOKEN)
        self.moves = CountedMoves(store)
        loop = asyncio.get_running_loop()
        self.task = PlacementTask(
            PlacementPlanner(FAST),
            StoreLease(store, "placement", owner=name),
            hosts=self.directory,
            commands=self.commands,
            moves=self.moves,
            count=lambda kind, outcome: self.counted.append((kind, outcome)),
            now_ms=lambda: loop.time() * 1000,
            wall_ms=lambda: 1,
        )

    async def aclose(self) -> None:
        await self.task.aclose()
        await self.commands.aclose()
        await self.directory.aclose()


async def test_one_of_two_workers_moves_until_every_expert_has_its_place(
    hosts: Hosts, open_store: Callable[[], StateStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.placement_task.TICK_S", 0.05)
    workers = [Worker(open_store(), name) for name in "xy"]
    for worker in workers:
        await worker.directory.start()
        worker.task.start()
    host, _ = hosts["h1"]
    async with host.driver.lease("a", request_id="r"):  # keeps a sixteenth of its slot busy
        await eventually(lambda: hosts["h2"][1].in_pool == {"a"})
        await eventually(lambda: hosts["h1"][1].in_pool == {"a", "b"})
        await eventually(lambda: sum(worker.moves.kept for worker in workers) == 2)
    for worker in workers:
        await worker.aclose()
    assert sorted(worker.counted for worker in workers) == [[], [("pool", "done")] * 2]
    moves = await MoveLog(open_store()).last()
    assert {(m["host"], m["expert"], m["outcome"]) for m in moves} == {
        ("h2", "a", "done"),
        ("h1", "b", "done"),
    }


COE_YAML = """\
experts:
  a:
    source: {path: x}
    price: {input_usd_per_mtok: 1, output_usd_per_mtok: 1}
    context_tokens: 512
  b:
    source: {path: x}
    price: {input_usd_per_mtok: 1, output_usd_per_mtok: 1}
    context_tokens: 512
hosts: [{name: h1, experts: [a, b]}]
policies: {dir: policies}
state: {timeout_ms: 5000}
placement: {mode: MODE, half_life_s: 0.1, pause_s: 1}
"""
DONE = b'coe_placement_moves_total{kind="pool",outcome="done"} 1.0'


@pytest.mark.parametrize(("mode", "ends"), [("auto", {"a", "b"}), ("off", {"a"})])
async def test_a_gateway_worker_places_experts_if_its_configuration_says_so(
    mode: str, ends: set[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plain_server: Any
) -> None:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "auto.yaml").write_text(
        "version: 1\ndefault: a\ncaps: {cost_usd: 1}\n"
    )
    (tmp_path / "coe.yaml").write_text(COE_YAML.replace("MODE", mode))
    monkeypatch.setattr("gateway.placement_task.TICK_S", 0.05)
    monkeypatch.setenv(TOKEN_ENV, TOKEN)
    engine = PooledEngine("a", places=2)

    async def start(*_: Any, **__: Any) -> tuple[PooledEngine, dict[str, str]]:
        return engine, {}

    monkeypatch.setattr(EngineGroup, "start", start)
    store = StateStore(plain_server.url, timeout_ms=5_000)
    host = ExpertHost(
        host_id="h1",
        config=HostConfig(name="h1", experts=("a", "b")),
        locations={"a": str(tmp_path), "b": str(tmp_path)},
        registry=HostRegistry(store),
        token=TOKEN,
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(store.aclose)
        stack.push_async_callback(host.aclose)
        await host.start()
        config = load_config(tmp_path / "coe.yaml")
        async with open_parts(config, plain_server.url) as parts:
            if mode == "auto":
                async with asyncio.timeout(30):  # a move is written down last of all
                    while not (moves := await parts.moves.last()):  # noqa: ASYNC110
                        await asyncio.sleep(0.01)
                assert [move["expert"] for move in moves] == ["b"]
                assert DONE in parts.metrics.render()
            else:
                await asyncio.sleep(0.3)
        assert engine.in_pool == ends
        assert await store.command("EXISTS", "coe:lease:placement") == 0, "it was given back"
