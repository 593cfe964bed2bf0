"""One suite for everything that calls experts: in process, and over HTTP against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest

from experts.errors import ExpertFailed, HostLost, QueueFull
from experts.http_backend import HttpBackend
from experts.protocol import Backend, ExpertCall
from experts.scripted import Script, ScriptedBackend
from experts.scripted_server import ScriptedServer
from experts.types import Endpoint
from tests.contract.gateway_kit import eventually, served

Make = Callable[[str], Backend]
MESSAGES = [{"role": "user", "content": "one two three"}]


@pytest.fixture
def server() -> ScriptedServer:
    return ScriptedServer()


@pytest.fixture(params=["scripted", "http"])
async def make(request: Any, server: ScriptedServer) -> AsyncIterator[Make]:
    if request.param == "scripted":
        yield lambda script: ScriptedBackend(Script.parse(script))
        return
    opened: list[HttpBackend] = []
    async with served(server) as url:

        def over_http(script: str) -> Backend:
            opened.append(HttpBackend(f"{url}/v1", upstream_model=script))
            return opened[-1]

        yield over_http
        for backend in opened:
            await backend.aclose()


def call(**changes: Any) -> ExpertCall:
    fields: dict[str, Any] = {
        "expert": "x",
        "endpoint": Endpoint.CHAT,
        "body": {"messages": MESSAGES},
        "request_id": "r1",
        "timeout_ms": 30_000.0,
        "first_token_timeout_ms": 30_000.0,
        "idle_timeout_ms": 30_000.0,
    }
    return ExpertCall(**fields | changes)


async def collect(backend: Backend, asked: ExpertCall) -> list[dict[str, Any]]:
    async with backend.stream(asked) as stream:
        return [msgspec.json.decode(payload) async for payload in stream]


async def test_whole_and_streamed_answers_agree(make: Make) -> None:
    backend = make("echo?queue_ms=3&swap_ms=4")
    body = {"messages": MESSAGES, "stream_options": {"include_usage": True}, "logprobs": True}
    reply = await backend.complete(call(body=body))
    chunks = await collect(backend, call(body=body))
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"])
    assert reply.body["choices"][0]["message"]["content"] == text == "one two three"
    assert chunks[-1]["usage"] == reply.body["usage"]
    tokens = reply.body["choices"][0]["logprobs"]["content"]
    streamed = [t for c in chunks[:-2] for t in c["choices"][0]["logprobs"]["content"]]
    assert tokens == streamed
    assert (reply.timings.host, reply.timings.queue_ms, reply.timings.swap_ms) == (
        "scripted",
        3.0,
        4.0,
    )


async def test_timings_are_there_before_the_first_event(make: Make) -> None:
    async with make("echo?queue_ms=3").stream(call()) as stream:
        assert stream.timings.queue_ms == 3.0


async def test_refusals_are_raised_typed(make: Make) -> None:
    for script, kind in (
        ("fail?status=503&code=queue_full", QueueFull),
        ("fail?status=500", ExpertFailed),
        ("fail?status=400", ExpertFailed),
    ):
        backend = make(script)
        with pytest.raises(kind):
            await backend.complete(call())
        with pytest.raises(kind):
            await collect(backend, call())


async def test_a_broken_stream_says_how_much_was_sent(make: Make) -> None:
    seen: list[bytes] = []
    with pytest.raises(HostLost) as error:
        await _consume(make("disconnect?after=2"), seen)
    assert len(seen) == error.value.sent_tokens == 2
    with pytest.raises(HostLost):
        await make("disconnect").complete(call())


async def _consume(backend: Backend, seen: list[bytes]) -> None:
    async with backend.stream(call()) as stream:
        async for payload in stream:
            seen.append(payload)


async def test_leaving_early_cancels(make: Make, server: ScriptedServer) -> None:
    backend = make("tokens?count=1000&pace_ms=20")
    async with backend.stream(call()) as stream:
        async for _ in stream:
            break
    task = asyncio.create_task(backend.complete(call()))
    if isinstance(backend, ScriptedBackend):
        await eventually(lambda: backend.calls == 2)
        task.cancel()
        await asyncio.wait({task})
        assert backend.cancelled == 2
    else:
        await eventually(lambda: server.stats.requests == 2)
        task.cancel()
        await asyncio.wait({task})
        await eventually(lambda: server.stats.disconnected == 2)
    assert task.cancelled()


async def test_equal_calls_get_equal_bytes(make: Make) -> None:
    backend = make("tokens?count=3")
    assert await collect(backend, call()) == await collect(backend, call())


async def test_a_slow_reader_is_not_the_expert_s_silence(make: Make) -> None:
    backend = make("tokens?count=5&pace_ms=200")
    seen = 0
    async with backend.stream(call(idle_timeout_ms=600.0)) as stream:
        async for _ in stream:
            seen += 1
            if seen == 1:  # the time that must not count; there is more to come after it
                await asyncio.sleep(0.7)
    assert seen == 6
