"""The decision log on real servers."""

from __future__ import annotations

import asyncio

import pytest

from deployments.store import StateStore
from gateway.state.decisions import DecisionLog

pytestmark = pytest.mark.valkey


def record(n: int) -> dict[str, object]:
    return {"decision_id": f"d{n}", "cost_micro_usd": n, "stages": [{"expert": "é"}], "error": None}


async def test_records_come_back_whole_newest_first(store: StateStore) -> None:
    log = DecisionLog(store)
    for n in range(150):  # more than one write takes
        log.append(record(n))
    await log.flush()
    assert await log.tail(3) == [record(149), record(148), record(147)]
    assert len(await log.tail(10_000)) == 150
    assert (log.queued, log.dropped) == (0, 0)


async def test_background_task_writes_without_being_asked(store: StateStore) -> None:
    log = DecisionLog(store)
    log.start()
    log.append(record(1))
    async with asyncio.timeout(30):
        while not await log.tail(1):
            pass
    await log.aclose()
    assert await log.tail(1) == [record(1)]


async def test_closing_writes_what_waits(store: StateStore) -> None:
    log = DecisionLog(store)
    log.start()
    log.append(record(1))
    await log.aclose()
    assert await log.tail(1) == [record(1)]


async def test_stream_is_bounded(store: StateStore) -> None:
    log = DecisionLog(store, keep_records=100, queue_records=2_000)
    for n in range(1_500):
        log.append(record(n))
    await log.flush()
    kept = await store.command("XLEN", store.key("decisions"))
    assert 100 <= kept <= 200  # the server trims by whole nodes of 100
    assert (await log.tail(1))[0]["decision_id"] == "d1499"


async def test_record_written_twice_is_shown_once(store: StateStore) -> None:
    log = DecisionLog(store)
    for n in (1, 2, 2):
        log.append(record(n))
    await log.flush()
    assert [r["decision_id"] for r in await log.tail(5)] == ["d2", "d1"]


def test_record_without_an_id_is_refused_at_once(store: StateStore) -> None:
    with pytest.raises(ValueError, match="decision_id"):
        DecisionLog(store).append({"expert": "a"})
