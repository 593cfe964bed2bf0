"""A whole expert host with everything real but the engine and the store behind the registry."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx2
import pytest

from deployments import host as host_module
from deployments.host import ExpertHost
from deployments.host_config import HostConfig
from deployments.host_record import HostRecord
from experts.engine_group import EngineGroup
from experts.errors import ArtifactError, HostLost, StateUnavailable
from tests.contract.gateway_kit import eventually
from tests.contract.host_kit import PooledEngine as Engine


class Registry:
    """Notes what the host says of itself; ``away`` makes it as unreachable as a store can be."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.unheard = 0
        self.away = False

    async def publish(self, record: HostRecord, ttl_ms: int) -> None:
        await self._say(record.slot_state)

    async def remove(self, host_id: str) -> None:
        await self._say("gone")

    async def _say(self, what: str) -> None:
        await asyncio.sleep(0)
        if self.away:
            self.unheard += 1
            raise StateUnavailable("test")
        self.said.append(what)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    engine = Engine()
    engine.resident = "a"

    async def start(*_: Any, **__: Any) -> tuple[Engine, dict[str, str]]:
        return engine, {}

    monkeypatch.setattr(EngineGroup, "start", start)
    monkeypatch.setattr(host_module, "HEARTBEAT_MS", 10)
    return engine


def make_host(registry: Any, locations: Mapping[str, str]) -> ExpertHost:
    return ExpertHost(
        host_id="host-1",
        config=HostConfig(name="one", experts=tuple(locations)),
        locations=locations,
        registry=registry,
        token="secret",
    )


@pytest.fixture
async def running(engine: Engine, tmp_path: Path) -> AsyncIterator[tuple[ExpertHost, Registry]]:
    registry = Registry()
    host = make_host(registry, {"a": str(tmp_path), "b": str(tmp_path)})
    await host.start()
    yield host, registry
    await host.aclose()


async def test_a_host_whose_engine_dies_leaves_the_registry_at_once_and_for_good(
    running: tuple[ExpertHost, Registry], engine: Engine
) -> None:
    host, registry = running
    await host.check_health()
    async with httpx2.AsyncClient(base_url=host.url) as client:
        assert (await client.get("/health")).status_code == 200
        engine.dead = True
        await eventually(lambda: "gone" in registry.said)
        assert (await client.get("/health")).status_code == 503
    with pytest.raises(HostLost):
        await host.check_health()
    engine.dead = False  # even if it seemed to come back: nobody renews the record any more
    with pytest.raises(HostLost):
        await host.check_health()
    assert registry.said[-1] == "gone"


async def test_a_host_that_closes_does_not_register_again_while_it_drains(
    running: tuple[ExpertHost, Registry], engine: Engine
) -> None:
    host, registry = running
    stuck = asyncio.Event()

    async def slow(expert: str) -> Any:
        await stuck.wait()

    engine.make_resident = slow  # type: ignore[method-assign]
    swap = asyncio.ensure_future(_hold(host, "b"))
    await eventually(lambda: "swapping" in registry.said)
    closing = asyncio.ensure_future(host.aclose())
    await eventually(lambda: "gone" in registry.said)
    await closing
    await asyncio.gather(swap, return_exceptions=True)
    assert registry.said.count("gone") == 1
    assert registry.said[-1] == "gone"
    assert engine.stopped == 1


async def test_a_host_whose_swap_hangs_leaves_the_registry_to_be_replaced(
    running: tuple[ExpertHost, Registry], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, registry = running

    def overdue() -> None:
        raise HostLost("a", "host-1")

    monkeypatch.setattr(host.driver, "check_health", overdue)
    await eventually(lambda: "gone" in registry.said)
    with pytest.raises(HostLost):
        await host.check_health()


async def _hold(host: ExpertHost, expert: str) -> None:
    async with host.driver.lease(expert, request_id="r"):
        pass


async def test_a_store_that_is_away_neither_stops_a_host_nor_its_end(
    running: tuple[ExpertHost, Registry], engine: Engine
) -> None:
    host, registry = running
    registry.away = True
    await eventually(lambda: registry.unheard >= 2)
    await host.check_health()
    said = len(registry.said)
    registry.away = False
    await eventually(lambda: len(registry.said) > said)
    registry.away = True
    await host.aclose()
    assert engine.stopped == 1


async def test_a_start_that_fails_can_be_closed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def start(*_: Any, **__: Any) -> Any:
        raise ArtifactError("x", "no weights")

    monkeypatch.setattr(EngineGroup, "start", start)
    registry = Registry()
    host = make_host(registry, {"a": str(tmp_path)})
    with pytest.raises(ArtifactError):
        await host.start()
    await host.aclose()
    assert registry.said == ["gone"]


async def test_an_engine_is_stopped_when_the_port_cannot_be_opened(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def taken(*_: Any, **__: Any) -> Any:
        raise OSError(98, "address in use")

    monkeypatch.setattr(host_module.socket, "create_server", taken)
    host = make_host(Registry(), {"a": str(tmp_path)})
    with pytest.raises(OSError, match="in use"):
        await host.start()
    await host.aclose()
    assert engine.stopped == 1
