"""Pains that users of other gateways report about interfaces, each as a test by its name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest

from experts.errors import AuthenticationFailed
from experts.scripted_server import ScriptedServer
from experts.types import Capability, SourceKind
from gateway.access import OpenGate
from gateway.keys import Access
from tests.contract.api_kit import anthropic_client, api_gateway, events_of, raw_post
from tests.contract.gateway_kit import (
    Gateway,
    eventually,
    make_gateway,
    openai_client,
    served,
    spec,
)

USER: list[Any] = [{"role": "user", "content": "one two three"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER},
    "/v1/completions": {"prompt": "one two three"},
    "/v1/responses": {"input": "one two three"},
    "/v1/messages": {"messages": USER, "max_tokens": 64},
}
ENDPOINTS = tuple(BODIES)


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return api_gateway(tmp_path)


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_pain_05_which_model_answered_is_said_everywhere(gateway: Gateway, path: str) -> None:
    """Body, every chunk that names a model, and header; streamed or not, cascade included."""
    async with served(gateway.app) as url:
        for model, expert in (("auto", "echo"), ("coe/casc", "final")):
            body = BODIES[path] | {"model": model}
            _, raw, headers = await raw_post(url, path, body)
            assert f'"model":"{expert}"'.encode() in raw
            assert headers["x-coe-expert"] == expert
            _, raw, headers = await raw_post(url, path, body | {"stream": True})
            assert headers["x-coe-expert"] == expert
            assert f'"model":"{expert}"'.encode() in raw
            assert f'"model":"{model}"'.encode() not in raw


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
async def test_pain_06_leaving_cancels_the_generation(
    tmp_path: Path, path: str, stream: bool
) -> None:
    upstream = ScriptedServer()
    async with served(upstream) as upstream_url:
        slow = spec(
            "slow",
            f"{upstream_url}/v1",
            kind=SourceKind.REMOTE,
            upstream_model="tokens?count=1000&pace_ms=20",
        )
        gateway = make_gateway(tmp_path, [spec("echo"), slow])
        async with served(gateway.app) as url:
            body = BODIES[path] | {"model": "slow", "stream": stream}
            asking = asyncio.create_task(raw_post(url, path, body))
            await eventually(lambda: upstream.stats.requests == 1)
            asking.cancel()
            await asyncio.wait({asking})
            await eventually(lambda: upstream.stats.disconnected == 1)
            await eventually(lambda: len(gateway.records) == 1)
        await gateway.pool.aclose()
    assert gateway.records[0]["outcome"] == "client_closed"
    assert upstream.stats.completed == 0


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_pain_02_a_failure_after_the_first_byte_is_told_in_band(
    gateway: Gateway, path: str
) -> None:
    async with served(gateway.app) as url:
        body = BODIES[path] | {"model": "cut", "stream": True}
        status, raw, _ = await raw_post(url, path, body)
    assert status == 200
    last = raw.rstrip().rpartition(b"\n\n")[2]
    assert b"host_lost" in last
    assert b"[DONE]" not in raw
    assert b"message_stop" not in raw
    assert b"response.completed" not in raw


async def test_pain_09_what_a_request_needs_is_held_against_experts_before_ranking(
    tmp_path: Path,
) -> None:
    plain = frozenset({Capability.CHAT})
    gateway = make_gateway(tmp_path, [spec("echo", capabilities=plain)])
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    sound = {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}}
    tool = {"type": "function", "function": {"name": "f"}}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
    asks: list[tuple[dict[str, Any], str]] = [
        ({"tools": [tool]}, "tools"),
        ({"tools": [tool], "parallel_tool_calls": True}, "parallel tool calls"),
        ({"messages": [{"role": "user", "content": [image]}]}, "images"),
        ({"messages": [{"role": "user", "content": [sound]}]}, "audio"),
        ({"response_format": schema}, "JSON schemas"),
        ({"logprobs": True}, "log-probabilities"),
    ]
    async with openai_client("http://gateway", gateway.app) as client:
        for change, need in asks:
            body: Any = {"model": "auto", "messages": USER} | change
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(**body)
            assert caught.value.code == "no_eligible_expert"
            assert need in caught.value.message
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(
                model="auto", messages=[{"role": "user", "content": "word " * 9000}]
            )
        assert caught.value.code == "context_length_exceeded"
    async with anthropic_client("http://gateway", gateway.app) as other:
        source: Any = {"type": "base64", "media_type": "image/png", "data": "AA=="}
        with pytest.raises(anthropic.BadRequestError, match="images"):
            await other.messages.create(
                model="auto",
                max_tokens=8,
                messages=[{"role": "user", "content": [{"type": "image", "source": source}]}],
            )
    assert gateway.scripted("echo").calls == 0


class OneKey(OpenGate):
    """Knows one secret."""

    async def authenticate(self, secret: str | None) -> Access:
        if secret != "right":
            raise AuthenticationFailed("No such key.")
        return Access()


async def test_pain_17_no_unauthenticated_request_reaches_an_expert(tmp_path: Path) -> None:
    """Every route but health and metrics; both headers of the two APIs carry the key."""
    gateway = api_gateway(tmp_path, gate=OneKey())
    paths = {*BODIES, "/v1/embeddings", "/v1/route", "/v1/messages/count_tokens"}
    async with served(gateway.app) as url:
        for path in sorted(paths):
            body = BODIES.get(path, {"messages": USER, "input": "x"}) | {"model": "auto"}
            status, raw, _ = await raw_post(url, path, body)
            assert (status, b"authentication_error" in raw) == (401, True), path
            # Before the body is looked at: a stranger learns nothing from a broken one.
            status, _, _ = await raw_post(url, path, {"nonsense": True})
            assert status == 401, path
        assert [gateway.scripted(name).calls for name in gateway.backends] == [0] * len(
            gateway.backends
        )
        for header, value in (("authorization", "Bearer right"), ("x-api-key", "right")):
            for path in ENDPOINTS:
                body = BODIES[path] | {"model": "auto"}
                status, _, _ = await raw_post(url, path, body, **{header: value})
                assert status == 200, (path, header)


async def test_pain_19_content_of_any_legal_shape_is_read(gateway: Gateway) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    async with openai_client("http://gateway", gateway.app) as client:
        for content in ("one two", parts):
            said: Any = [{"role": "user", "content": content}]
            answer = await client.chat.completions.create(model="auto", messages=said)
            assert answer.choices[0].message.content == "one two"
        items: Any = [
            {"role": "user", "content": [{"type": "input_text", "text": "one two"}]},
        ]
        assert (await client.responses.create(model="auto", input=items)).output_text == "one two"
    async with anthropic_client("http://gateway", gateway.app) as other:
        said = [{"role": "user", "content": parts}]
        message = await other.messages.create(model="auto", max_tokens=8, messages=said)
        assert message.content[0].to_dict()["text"] == "one two"


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_pain_20_escalations_are_on_the_bill(gateway: Gateway, path: str) -> None:
    async with served(gateway.app) as url:
        body = BODIES[path] | {"model": "coe/casc"}
        _, raw, headers = await raw_post(url, path, body)
        assert headers["x-coe-stages"] == "2"
        _, streamed, _ = await raw_post(url, path, body | {"stream": True})
    stages = gateway.records[0]["stages"]
    paid = sum(stage["cost_micro_usd"] for stage in stages)
    assert all(stage["cost_micro_usd"] > 0 for stage in stages)
    assert f"{paid / 1e6:.6f}" == headers["x-coe-cost-usd"]
    assert b'"cost_usd":' in raw
    assert b'"cost_usd":' in streamed


async def test_pain_21_explaining_runs_the_code_that_serves(gateway: Gateway) -> None:
    async with openai_client("http://gateway", gateway.app) as client:
        view = await client.post(
            "/route", body={"model": "coe/casc", "messages": USER}, cast_to=dict[str, Any]
        )
        answer = await client.chat.completions.create(
            model="coe/casc", messages=USER, extra_body={"coe": {"explain": True}}
        )
    explained = (answer.model_extra or {})["coe"]["explain"]
    assert explained["plan"] == view["plan"]
    assert explained["needs"] == view["needs"]
    assert set(view["excluded"]) | {c["expert"] for c in view["eligible"]} == set(gateway.backends)


@pytest.mark.parametrize("path", ENDPOINTS)
async def test_pain_23_a_named_model_answers_or_the_request_fails(
    gateway: Gateway, path: str
) -> None:
    async with served(gateway.app) as url:
        status, raw, _ = await raw_post(url, path, BODIES[path] | {"model": "broken"})
        assert status == 502, raw
        status, _, _ = await raw_post(url, path, BODIES[path] | {"model": "gpt-nobody"})
        assert status == 404
    assert {stage["expert"] for r in gateway.records for stage in r["stages"]} == {"broken"}


async def test_pain_of_tool_calls_that_lose_arguments_in_a_stream(gateway: Gateway) -> None:
    """The same calls, byte for byte, by every API, streamed and whole."""
    names = ("weather", "news")
    functions = [{"name": name, "parameters": {"type": "object"}} for name in names]
    async with served(gateway.app) as url:
        chat_tools = [{"type": "function", "function": f} for f in functions]
        body: dict[str, Any] = {"model": "caller", "tools": chat_tools, "messages": USER}
        async with openai_client(url) as client:
            whole = await client.chat.completions.create(**body)
            async with client.chat.completions.stream(**body) as stream:
                streamed = await stream.get_final_completion()
        calls = [
            [(c.function.name, c.function.arguments) for c in one.choices[0].message.tool_calls]
            for one in (whole, streamed)
        ]
        assert calls[0] == calls[1]
        body = {"model": "caller", "max_tokens": 64, "messages": USER, "stream": True}
        body["tools"] = [{"name": name, "input_schema": {"type": "object"}} for name in names]
        _, raw, _ = await raw_post(url, "/v1/messages", body)
    pieces: dict[int, str] = {}
    for name, data in events_of(raw):
        if name == "content_block_delta":
            pieces[data["index"]] = pieces.get(data["index"], "") + data["delta"]["partial_json"]
    assert [(name, pieces[i]) for i, name in enumerate(names)] == calls[0]
