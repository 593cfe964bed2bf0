"""Streams on the wire: exact bytes, failures after the first token, leaving clients, dying hosts.

Upstream is the shipped scripted server behind a real socket, as a host or a remote would be.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from deployments.host_record import HostRecord
from experts.scripted import Script
from experts.scripted_server import ScriptedServer
from experts.types import ExpertSpec, SourceKind
from gateway.service import ServiceLimits
from tests.contract.api_kit import Patience
from tests.contract.gateway_kit import (
    CASCADE_POLICY,
    PLAIN_POLICY,
    Gateway,
    eventually,
    make_gateway,
    openai_client,
    served,
    spec,
)

USER: list[Any] = [{"role": "user", "content": "one two"}]


class Hosts:
    """A host directory with fixed records."""

    def __init__(self, *records: HostRecord) -> None:
        self.records = list(records)
        self.suspects: list[str] = []

    def hosts_for(self, expert: str) -> list[HostRecord]:
        return [r for r in self.records if r.serves(expert) and r.host_id not in self.suspects]

    def mark_suspect(self, host_id: str, until_ms: float) -> None:
        self.suspects.append(host_id)

    def note_dispatched(self, host_id: str, expert: str) -> None:
        return None


def record(host: str, url: str, *experts: str) -> HostRecord:
    return HostRecord(host, url, experts, resident=experts[0], heartbeat_ms=int(time.time() * 1000))


def hosted(expert: str) -> ExpertSpec:
    return spec(expert, location="/models/none", kind=SourceKind.WEIGHTS)


async def read_sse(url: str, body: dict[str, Any]) -> tuple[int, bytes]:
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{url}/v1/chat/completions", json=body) as answer,
    ):
        return answer.status, await answer.read()


@pytest.fixture
def upstream() -> ScriptedServer:
    return ScriptedServer(
        {
            "echo": Script.parse("echo?queue_ms=12&swap_ms=34"),
            "slow": Script.parse("tokens?count=1000&pace_ms=20"),
            "late": Script.parse("tokens?count=3&delay_ms=30000"),
            "cut": Script.parse("disconnect?after=3"),
            "cut-at-once": Script.parse("disconnect?after=0"),
            "draft": Script.parse("tokens?count=500&pace_ms=1&confidence=0.2"),
            "final": Script.parse("fixed?text=final"),
            "upstream-name": Script.parse("echo"),
        }
    )


@pytest.fixture
async def upstream_url(upstream: ScriptedServer) -> AsyncIterator[str]:
    async with served(upstream) as url:
        yield url


@pytest.fixture
async def gateway(tmp_path: Path, upstream_url: str) -> AsyncIterator[Gateway]:
    names = ("echo", "slow", "late", "cut", "cut-at-once", "draft", "final")
    remote = spec(
        "remote",
        f"{upstream_url}/v1",
        kind=SourceKind.REMOTE,
        upstream_model="upstream-name",
        secret_env="UPSTREAM_KEY",
    )
    gateway = make_gateway(
        tmp_path,
        [*map(hosted, names), remote],
        policies={"auto": PLAIN_POLICY, "casc": CASCADE_POLICY},
        # Two, because a host that cut a stream off is left alone for a while.
        directory=Hosts(*(record(host, upstream_url, *names) for host in ("host-a", "host-b"))),
    )
    yield gateway
    await gateway.pool.aclose()


@pytest.fixture
async def url(gateway: Gateway) -> AsyncIterator[str]:
    async with served(gateway.app) as url:
        yield url


async def test_the_exact_bytes_of_a_stream(url: str) -> None:
    status, raw = await read_sse(
        url, {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    )
    head = b'"id":"chatcmpl-scripted","object":"chat.completion.chunk","created":1700000000'
    coe = (
        b'"coe":{"decision_id":"decision-0","expert":"echo","category":"general","policy":"auto",'
        b'"stages":1'
    )
    assert status == 200
    assert raw == (
        b"data: {" + head + b',"model":"echo","choices":[{"delta":{"role":"assistant",'
        b'"content":"hi"},"logprobs":null,"finish_reason":null,"index":0}],' + coe + b"}}\n\n"
        b"data: {" + head + b',"model":"echo","choices":[{"delta":{},"logprobs":null,'
        b'"finish_reason":"stop","index":0}],' + coe + b',"cost_usd":3e-6,'
        b'"usage":{"prompt_tokens":1,"completion_tokens":1}}}\n\n'
        b"data: [DONE]\n\n"
    )


async def test_host_timings_and_token_travel(
    url: str, gateway: Gateway, upstream: ScriptedServer
) -> None:
    async with openai_client(url) as client:
        raw = await client.chat.completions.with_raw_response.create(model="echo", messages=USER)
    assert (raw.headers["x-coe-queue-ms"], raw.headers["x-coe-swap-ms"]) == ("12.0", "34.0")
    sent = upstream.stats.last_headers or {}
    assert sent["authorization"] == "Bearer host-token"
    assert sent["x-request-id"] == raw.headers["x-request-id"]
    assert float(sent["x-coe-queue-deadline-ms"]) > 0
    assert (upstream.stats.last_body or {})["max_tokens"] == 64, "the policy's bound holds upstream"
    assert gateway.records[-1]["stages"][0]["host"] == "scripted"


async def test_a_remote_keeps_its_own_name_and_key(url: str, upstream: ScriptedServer) -> None:
    async with openai_client(url) as client:
        stream = await client.chat.completions.create(model="remote", messages=USER, stream=True)
        chunks = [chunk async for chunk in stream]
    assert {chunk.model for chunk in chunks} == {"remote"}
    assert (upstream.stats.last_body or {})["model"] == "upstream-name"
    sent = upstream.stats.last_headers or {}
    assert sent["authorization"] == "Bearer sk-upstream"
    assert not any(name.startswith("x-coe-") for name in sent)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_leaving_client_cancels_upstream(
    url: str, gateway: Gateway, upstream: ScriptedServer, stream: bool
) -> None:
    body = {"model": "slow", "messages": USER, "stream": stream, "max_tokens": 1000}
    async with aiohttp.ClientSession() as http:
        asking = asyncio.create_task(_read_one(http, url, body))
        await eventually(lambda: upstream.stats.requests == 1)
        if stream:
            await asking  # one chunk read; leaving the session closes the connection
        else:
            asking.cancel()
            await asyncio.wait({asking})
    await eventually(lambda: upstream.stats.disconnected == 1)
    await eventually(lambda: len(gateway.records) == 1)
    assert gateway.records[0]["outcome"] == "client_closed"
    assert gateway.records[0]["stages"][0]["verdict"] == "aborted"
    assert upstream.stats.completed == 0


async def _read_one(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> bytes:
    answer = await http.post(f"{url}/v1/chat/completions", json=body)
    try:
        return await answer.content.readline()
    finally:
        answer.close()


async def test_a_leaving_client_is_noticed_before_the_first_token(
    url: str, gateway: Gateway, upstream: ScriptedServer
) -> None:
    async with aiohttp.ClientSession() as http:
        body = {"model": "late", "messages": USER, "stream": True}
        asking = asyncio.create_task(_read_one(http, url, body))
        await eventually(lambda: upstream.stats.requests == 1)
        asking.cancel()
        await asyncio.wait({asking})
    await eventually(lambda: upstream.stats.disconnected == 1)
    await eventually(lambda: len(gateway.records) == 1)
    assert gateway.records[0]["outcome"] == "client_closed"


async def test_a_host_dying_in_mid_stream_is_told_in_band(url: str, gateway: Gateway) -> None:
    async with openai_client(url) as client:
        stream = await client.chat.completions.create(model="cut", messages=USER, stream=True)
        seen: list[str] = []
        with pytest.raises(openai.APIError) as error:
            await _collect(stream, seen)
    assert seen == ["t0 ", "t1 ", "t2 "]
    assert error.value.code == "host_lost"
    status, raw = await read_sse(url, {"model": "cut", "messages": USER, "stream": True})
    assert status == 200
    assert raw.rstrip().rpartition(b"\n")[2].startswith(b'data: {"error":{"message":')
    assert b"[DONE]" not in raw
    assert gateway.records[0]["outcome"] == "error"
    assert gateway.records[0]["stages"][0]["output_tokens"] == 3, "what was sent is charged"


async def _collect(stream: Any, seen: list[str]) -> None:
    async for chunk in stream:
        seen.append(chunk.choices[0].delta.content or "")


async def test_a_host_dying_before_the_first_token_is_replaced(
    tmp_path: Path, upstream_url: str
) -> None:
    broken = ScriptedServer({"echo": Script.parse("disconnect?after=0")})
    async with served(broken) as broken_url:
        hosts = Hosts(record("a", broken_url, "echo"), record("b", upstream_url, "echo"))
        gateway = make_gateway(tmp_path, [hosted("echo")], directory=hosts)
        async with openai_client("http://gateway", gateway.app) as client:
            stream = await client.chat.completions.create(model="auto", messages=USER, stream=True)
            text = "".join([c.choices[0].delta.content or "" async for c in stream])
        await gateway.pool.aclose()
    assert text == "one two"
    assert hosts.suspects == ["a"]
    assert broken.stats.requests == 1
    assert len(gateway.records[0]["stages"]) == 1, "another host is not another stage"


async def test_the_only_host_lost_is_a_502(url: str) -> None:
    status, raw = await read_sse(url, {"model": "cut-at-once", "messages": USER, "stream": True})
    assert (status, b'"code":"host_lost"' in raw) == (502, True)


async def test_an_escalated_draft_is_aborted_upstream(
    url: str, upstream: ScriptedServer, gateway: Gateway
) -> None:
    async with openai_client(url) as client:
        stream = await client.chat.completions.create(model="coe/casc", messages=USER, stream=True)
        chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "final"
    assert {c.model for c in chunks} == {"final"}
    await eventually(lambda: upstream.stats.disconnected == 1)
    await eventually(lambda: len(gateway.records) == 1)
    draft = gateway.records[0]["stages"][0]
    assert draft["verdict"] == "escalate"
    assert 4 <= draft["output_tokens"] < 100, "the draft was stopped at the window, not at its end"


async def test_comments_keep_a_waiting_stream_alive(tmp_path: Path) -> None:
    async with served(Patience(tmp_path)) as url:
        status, raw = await read_sse(url, {"model": "late", "messages": USER, "stream": True})
        assert status == 200
        assert raw.startswith(b": waiting\n\n: waiting\n\n")
        assert raw.endswith(b"data: [DONE]\n\n")
        body = {"model": "late-broken", "messages": USER, "stream": True}
        status, raw = await read_sse(url, body)
        assert status == 200, "the first comment has committed to it"
        assert raw.rpartition(b": waiting\n\n")[2].startswith(b'data: {"error":')
        async with openai_client(url) as client:
            stream = await client.chat.completions.create(model="late", messages=USER, stream=True)
            assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "done"


async def test_silence_between_tokens_ends_in_a_timeout(tmp_path: Path, upstream_url: str) -> None:
    for model, limits, expected in (
        ("late", ServiceLimits(first_token_timeout_ms=100), 504),
        ("slow", ServiceLimits(idle_timeout_ms=10), 200),
    ):
        gateway = make_gateway(
            tmp_path,
            [hosted("echo"), hosted("late"), hosted("slow")],
            directory=Hosts(record("host-a", upstream_url, "echo", "late", "slow")),
            limits=limits,
        )
        async with served(gateway.app) as url:
            status, raw = await read_sse(url, {"model": model, "messages": USER, "stream": True})
        await gateway.pool.aclose()
        assert (status, b'"code":"upstream_timeout"' in raw) == (expected, True)
        assert (b"t0 " in raw) == (model == "slow")


async def test_an_upstream_slow_to_close_does_not_look_like_a_leaving_client(
    tmp_path: Path,
) -> None:
    async def lingering(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await ScriptedServer()(scope, receive, send)
            return
        await receive()
        head = {"type": "http.response.start", "status": 200, "headers": []}
        await send(head)
        chunk = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await asyncio.sleep(0.1)
        await send({"type": "http.response.body", "body": b""})

    async with served(lingering) as upstream:
        hosts = Hosts(record("host-a", upstream, "echo"))
        gateway = make_gateway(tmp_path, [hosted("echo")], directory=hosts)
        async with served(gateway.app) as url:
            _, raw = await read_sse(url, {"model": "auto", "messages": USER, "stream": True})
            await eventually(lambda: len(gateway.records) == 1)
        await gateway.pool.aclose()
    assert raw.endswith(b"data: [DONE]\n\n")
    assert gateway.records[0]["outcome"] == "ok"
