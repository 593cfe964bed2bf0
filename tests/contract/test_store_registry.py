"""The host registry on real servers."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

import pytest

from deployments.registry import HostRecord, HostRegistry, progress_key, publish_progress
from deployments.store import StateStore

pytestmark = pytest.mark.valkey

RECORD = HostRecord(
    host_id="h1",
    url="http://127.0.0.1:9",
    experts=("a", "b"),
    resident="a",
    queue_depths={"b": 2},
    in_flight=3,
    swap_ms={"b": 41.5},
    out_of_service={"c": "canary"},
    slot_state="serving",
    heartbeat_ms=1_700_000_000_123,
    started_ms=1_700_000_000_000,
    version="1",
)
LONG_MS = 60_000


async def test_record_comes_back_whole_through_another_client(
    open_store: Callable[[], StateStore],
) -> None:
    await HostRegistry(open_store()).publish(RECORD, LONG_MS)
    assert await HostRegistry(open_store()).list_live() == [RECORD]


async def test_second_heartbeat_replaces_the_first(store: StateStore) -> None:
    registry = HostRegistry(store)
    await registry.publish(RECORD, LONG_MS)
    later = dataclasses.replace(RECORD, resident="b", queue_depths={})
    await registry.publish(later, LONG_MS)
    assert await registry.list_live() == [later]


async def test_silent_host_disappears_and_leaves_nothing_behind(store: StateStore) -> None:
    registry = HostRegistry(store)
    await registry.publish(dataclasses.replace(RECORD, host_id="living"), LONG_MS)
    await registry.publish(RECORD, 50)
    async with asyncio.timeout(30):
        while len(await registry.list_live()) > 1:  # noqa: ASYNC110 - the server expires it
            await asyncio.sleep(0.01)
    assert [r.host_id for r in await registry.list_live()] == ["living"]
    for part, command in (("records", "HKEYS"), ("expiry", "ZRANGE")):
        key = store.key("{hosts}", part)
        bounds = () if command == "HKEYS" else (0, -1)
        assert await store.command(command, key, *bounds) == [b"living"]


async def test_short_lease_does_not_shorten_the_lives_of_others(store: StateStore) -> None:
    registry = HostRegistry(store)
    await registry.publish(RECORD, LONG_MS)
    await registry.publish(dataclasses.replace(RECORD, host_id="brief"), 50)
    assert await store.command("PTTL", store.key("{hosts}", "records")) > LONG_MS / 2


async def test_removed_host_is_gone_at_once(store: StateStore) -> None:
    registry = HostRegistry(store)
    await registry.publish(RECORD, LONG_MS)
    await registry.remove("h1")
    await registry.remove("never there")
    assert await registry.list_live() == []


async def test_epoch_stays_until_the_data_is_lost(
    open_store: Callable[[], StateStore],
) -> None:
    store = open_store()
    first = await HostRegistry(store).snapshot()
    again = await HostRegistry(open_store()).snapshot()
    assert first.epoch == again.epoch
    await store.command("DEL", store.key("{hosts}", "epoch"))
    async with asyncio.timeout(30):
        while (await HostRegistry(store).snapshot()).epoch == first.epoch:
            await store.command("DEL", store.key("{hosts}", "epoch"))


async def test_unreadable_record_hides_nobody_and_is_logged_once(
    store: StateStore, caplog: pytest.LogCaptureFixture
) -> None:
    registry = HostRegistry(store)
    await registry.publish(RECORD, LONG_MS)
    await store.command("HSET", store.key("{hosts}", "records"), "odd", b"{not json")
    for _ in range(3):
        assert await registry.list_live() == [RECORD]
    assert caplog.text.count("host odd has an unreadable record") == 1


async def test_progress_note_can_be_read_and_expires(store: StateStore, namespace: str) -> None:
    await publish_progress(store, namespace, "loading")
    assert await store.command("GET", progress_key(namespace)) == b"loading"
    assert await store.command("TTL", progress_key(namespace)) > 0
    await store.command("DEL", progress_key(namespace))
