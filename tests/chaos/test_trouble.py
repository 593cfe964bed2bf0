"""Things that break while the whole stack runs: hosts that die, a store that goes away."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import psutil
import pytest

from deployments.embedded_valkey import EmbeddedValkey
from tests.integration.stack import Stack, launch, quickstart_is_prepared, wait_ready, write_config

pytestmark = [
    pytest.mark.engine,
    pytest.mark.ray,
    pytest.mark.valkey,
    pytest.mark.timeout(600),
]

RECOVERY_S = 300.0


@pytest.fixture(scope="module")
def store() -> Iterator[EmbeddedValkey]:
    """The operator's own server, named by ``state.redis_url``."""
    server = EmbeddedValkey()
    server.start()
    server.wait_ready(timeout_s=60)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, store: EmbeddedValkey) -> Iterator[Stack]:
    assert quickstart_is_prepared(), "run `make models` first"
    folder = tmp_path_factory.mktemp("chaos")
    config = write_config(folder, state={"redis_url": "env:CHAOS_REDIS_URL"})
    running = launch(config, folder, {"CHAOS_REDIS_URL": store.url})
    try:
        yield wait_ready(running)
    finally:
        if running.process.poll() is None:
            running.stop()


def body(text: str = "Say hello.", **more: Any) -> dict[str, Any]:
    return {
        "model": "general",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 8,
        **more,
    }


async def answer_status(stack: Stack) -> int:
    async with httpx.AsyncClient(timeout=60) as http:
        return (await http.post(f"{stack.url}/chat/completions", json=body())).status_code


async def until_served(stack: Stack) -> float:
    started = time.monotonic()
    while await answer_status(stack) != 200:
        assert time.monotonic() - started < RECOVERY_S, stack.text()
        await asyncio.sleep(0.5)
    return time.monotonic() - started


async def test_the_store_goes_away_and_comes_back(stack: Stack, store: EmbeddedValkey) -> None:
    base = stack.url.removesuffix("/v1")
    os.kill(store.pid or 0, signal.SIGKILL)
    async with httpx.AsyncClient(timeout=30) as http:
        for _ in range(5):
            assert await answer_status(stack) == 200  # on the last known hosts

        async def degraded() -> set[str]:
            return set((await http.get(f"{base}/health/ready")).json()["degraded"])

        async with asyncio.timeout(60):
            while "state" not in await degraded():  # noqa: ASYNC110 - another process is awaited
                await asyncio.sleep(0.2)
        store.start()
        store.wait_ready(timeout_s=60)
        async with asyncio.timeout(60):
            while await degraded():  # noqa: ASYNC110
                await asyncio.sleep(0.2)
    assert await answer_status(stack) == 200


async def test_a_host_killed_in_mid_stream_gives_an_error_event(stack: Stack) -> None:
    seen = 0
    error: openai.APIError | None = None
    async with openai.AsyncOpenAI(base_url=stack.url, api_key="x", max_retries=0) as client:
        stream = await client.chat.completions.create(
            **body("Tell me a very long story.", max_tokens=1500), stream=True
        )
        try:
            async for chunk in stream:
                seen += len(chunk.choices)
                if seen == 5:
                    stack.replica().kill()
        except openai.APIError as caught:
            error = caught
    assert seen >= 5
    assert error is not None
    assert error.code == "host_lost"
    await until_served(stack)


async def test_a_host_killed_while_idle_is_refused_at_once_and_replaced(stack: Stack) -> None:
    stack.replica().kill()
    started = time.monotonic()
    async with httpx.AsyncClient(timeout=30) as http:
        reply = await http.post(f"{stack.url}/chat/completions", json=body())
    refused_s = time.monotonic() - started
    assert reply.status_code in (502, 503)
    assert reply.json()["error"]["code"] in ("host_lost", "host_unavailable")
    replaced_s = await until_served(stack)
    assert refused_s < replaced_s / 2, "nobody is kept waiting for the next replica"


async def test_an_engine_that_dies_takes_its_host_along(stack: Stack) -> None:
    """The health check notices; Ray Serve replaces the replica with all that belongs to it."""
    replica = stack.replica()
    stack.engine().kill()
    await until_served(stack)
    assert await asyncio.to_thread(psutil.wait_procs, [replica], 60) == ([replica], [])
    assert stack.replica().pid != replica.pid


async def test_a_gateway_worker_that_dies_is_started_again(stack: Stack) -> None:
    (worker,) = stack.processes("gateway.worker")
    worker.kill()
    started = time.monotonic()
    while True:
        try:
            if await answer_status(stack) == 200:
                break
        except httpx.TransportError:
            pass
        assert time.monotonic() - started < RECOVERY_S
        await asyncio.sleep(0.2)


def test_ctrl_c_ends_every_process(stack: Stack) -> None:
    """Last in the file: it stops the stack."""
    assert stack.stop(signal.SIGINT) == 0
    assert stack.processes() == []
