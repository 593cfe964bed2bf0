"""The store client against real servers: scripts, and what counts as whose fault."""

from __future__ import annotations

import asyncio
import logging

import pytest
import redis
from redis.exceptions import DataError, ResponseError

from deployments.store import StateStore
from experts.errors import StateUnavailable

pytestmark = pytest.mark.valkey

ADD = "return redis.call('INCRBY', KEYS[1], ARGV[1])"


async def test_script_runs_although_the_server_has_never_seen_it(store: StateStore) -> None:
    store.add_script("add", ADD)
    assert await store.eval_script("add", [store.key("n")], [2]) == 2
    assert await store.eval_script("add", [store.key("n")], [3]) == 5


async def test_script_is_loaded_again_after_the_server_forgot_it(store: StateStore) -> None:
    store.add_script("add", ADD)
    await store.eval_script("add", [store.key("n")], [1])
    await store.command("SCRIPT", "FLUSH")
    assert await store.eval_script("add", [store.key("n")], [1]) == 2
    assert store.available


async def test_script_defect_is_no_outage(store: StateStore) -> None:
    store.add_script("broken", "return redis.call('NO-SUCH-COMMAND')")
    with pytest.raises(ResponseError):
        await store.eval_script("broken", [], [])
    assert store.available


async def test_argument_that_cannot_be_sent_is_no_outage(store: StateStore) -> None:
    with pytest.raises(DataError):
        await store.command("SET", store.key("x"), None)  # type: ignore[arg-type]
    assert await store.ping() > 0


async def test_more_callers_than_connections_are_all_served(store_url: str, namespace: str) -> None:
    store = StateStore(store_url, namespace=namespace, timeout_ms=5_000, max_connections=4)
    replies = await asyncio.gather(*(store.ping() for _ in range(200)))
    with redis.Redis.from_url(store_url) as client:
        clients = client.client_list()
    await store.aclose()
    assert len(replies) == 200
    assert len(clients) < 50


async def test_cancelled_call_leaves_no_reply_for_the_next_one(
    store_url: str, namespace: str
) -> None:
    store = StateStore(store_url, namespace=namespace, timeout_ms=5_000, max_connections=1)
    waiting = asyncio.create_task(store.command("BLPOP", store.key("never"), 4))
    while not await _is_blocked(store_url):  # the server has no event for us
        assert not waiting.done()
        await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert await store.command("ECHO", "mine") == b"mine"
    await store.aclose()


async def _is_blocked(url: str) -> bool:
    with redis.Redis.from_url(url) as client:
        return int(client.info("clients")["blocked_clients"]) > 0


async def test_wrong_password_is_an_outage_whose_log_line_holds_no_password(
    embedded_server: object, caplog: pytest.LogCaptureFixture
) -> None:
    url = embedded_server.url  # type: ignore[attr-defined]
    password = url.split(":")[2].split("@")[0]
    store = StateStore(url.replace(password, "wrong-secret"), timeout_ms=5_000)
    with caplog.at_level(logging.DEBUG), pytest.raises(StateUnavailable):
        await store.ping()
    await store.aclose()
    assert "is away" in caplog.text
    assert "wrong-secret" not in caplog.text


async def test_full_server_refuses_writes_but_stays_available(
    plain_server: object, caplog: pytest.LogCaptureFixture
) -> None:
    store = StateStore(plain_server.url, timeout_ms=5_000)  # type: ignore[attr-defined]
    await store.command("CONFIG", "SET", "maxmemory", 1, "maxmemory-policy", "noeviction")
    for _ in range(3):
        with pytest.raises(StateUnavailable):
            await store.command("SET", "x", "y")
    assert store.available
    await store.aclose()
    assert caplog.text.count("refuses set") == 1
