"""What Anthropic's official client, strict, sees at /v1/messages, in process and over a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
from anthropic import AsyncAnthropic

from tests.contract.api_kit import (
    SERVERS,
    Patience,
    anthropic_client,
    api_gateway,
    events_of,
    raw_post,
)
from tests.contract.gateway_kit import Gateway, served

USER: list[Any] = [{"role": "user", "content": "one two three"}]
TOOLS: list[Any] = [
    {"name": name, "description": name, "input_schema": {"type": "object", "properties": {}}}
    for name in ("weather", "news")
]


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return api_gateway(tmp_path)


@pytest.fixture
async def impatient_url(tmp_path: Path) -> AsyncIterator[str]:
    """A gateway that begins its keep-alives at once."""
    async with served(Patience(tmp_path)) as url:
        yield url


@pytest.fixture(params=SERVERS)
async def client(request: Any, gateway: Gateway) -> AsyncIterator[AsyncAnthropic]:
    if request.param == "in process":
        async with anthropic_client("http://gateway", gateway.app) as client:
            yield client
        return
    async with served(gateway.app) as url, anthropic_client(url) as client:
        yield client


async def test_a_plain_message(client: AsyncAnthropic, gateway: Gateway) -> None:
    raw = await client.messages.with_raw_response.create(
        model="auto", max_tokens=64, system="Be brief.", messages=USER
    )
    message = await raw.parse()
    assert [block.model_dump() for block in message.content] == [
        {"type": "text", "text": "one two three", "citations": None}
    ]
    assert (message.model, message.stop_reason, message.role) == ("echo", "end_turn", "assistant")
    assert (message.usage.input_tokens, message.usage.output_tokens) == (3, 3)
    assert message._request_id == raw.headers["x-request-id"]
    assert (message.model_extra or {})["coe"]["cost_usd"] == pytest.approx(9e-6)
    assert raw.headers["x-coe-expert"] == "echo"
    assert gateway.records[-1]["endpoint"] == "messages"


async def test_a_streamed_message_is_the_same_message(client: AsyncAnthropic) -> None:
    ask: Any = {"max_tokens": 64, "messages": USER, "tools": TOOLS}
    for model in ("echo", "caller"):
        whole = await client.messages.create(model=model, **ask)
        async with client.messages.stream(model=model, **ask) as stream:
            streamed = await stream.get_final_message()
        assert [b.to_dict() for b in streamed.content] == [b.to_dict() for b in whole.content]
        assert streamed.stop_reason == whole.stop_reason
        assert streamed.usage.output_tokens == whole.usage.output_tokens
        assert streamed.usage.input_tokens == whole.usage.input_tokens
        assert streamed.model == whole.model == model


async def test_tool_calls_and_results(client: AsyncAnthropic) -> None:
    message = await client.messages.create(
        model="caller", max_tokens=64, messages=USER, tools=TOOLS, tool_choice={"type": "any"}
    )
    assert message.stop_reason == "tool_use"
    calls = [block for block in message.content if block.type == "tool_use"]
    assert [call.name for call in calls] == ["weather", "news"]
    assert calls[0].input == {"city": "Köln", "days": [1, 2], "note": 'a"b'}
    results: list[Any] = [
        {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"} for call in calls
    ]
    history: list[Any] = [
        *USER,
        {"role": "assistant", "content": [block.to_dict() for block in message.content]},
        {"role": "user", "content": [*results, {"type": "text", "text": "and now"}]},
    ]
    again = await client.messages.create(model="echo", max_tokens=64, messages=history, tools=TOOLS)
    assert again.content[0].to_dict()["text"] == "and now"


async def test_thinking_is_shown_only_to_who_asks(client: AsyncAnthropic) -> None:
    ask: Any = {"model": "thinker", "max_tokens": 2048, "messages": USER}
    silent = await client.messages.create(**ask)
    assert [block.type for block in silent.content] == ["text"]
    asked = await client.messages.create(**ask, thinking={"type": "enabled", "budget_tokens": 1024})
    assert [block.type for block in asked.content] == ["thinking", "text"]
    async with client.messages.stream(
        **ask, thinking={"type": "enabled", "budget_tokens": 1024}
    ) as stream:
        streamed = (await stream.get_final_message()).content
    assert [block.to_dict() for block in streamed] == [b.to_dict() for b in asked.content]


async def test_a_cut_answer_says_max_tokens(client: AsyncAnthropic) -> None:
    message = await client.messages.create(model="tokens", max_tokens=2, messages=USER)
    assert message.stop_reason == "max_tokens"


async def test_a_cascade_answers_here_too(client: AsyncAnthropic, gateway: Gateway) -> None:
    ask: Any = {"model": "coe/casc", "max_tokens": 64, "messages": USER}
    message = await client.messages.create(**ask)
    assert (message.model, message.content[0].to_dict()["text"]) == (
        "final",
        "the strong final answer",
    )
    async with client.messages.stream(**ask) as stream:
        streamed = await stream.get_final_message()
    assert streamed.model == "final"
    assert [s["verdict"] for s in gateway.records[-1]["stages"]] == ["escalate", "accept"]


async def test_counting_tokens(client: AsyncAnthropic, gateway: Gateway) -> None:
    few = await client.messages.count_tokens(model="auto", messages=USER)
    more = await client.messages.count_tokens(model="auto", messages=USER, tools=TOOLS)
    assert 0 < few.input_tokens < more.input_tokens
    assert gateway.scripted("echo").calls == 0


@pytest.mark.parametrize(
    ("change", "kind", "name"),
    [
        ({"model": "nobody"}, anthropic.NotFoundError, "not_found_error"),
        ({"messages": []}, anthropic.BadRequestError, "invalid_request_error"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, anthropic.BadRequestError, ""),
        ({"model": "broken"}, anthropic.InternalServerError, "api_error"),
    ],
)
async def test_errors_are_in_anthropic_s_shape(
    client: AsyncAnthropic, change: dict[str, Any], kind: type[anthropic.APIStatusError], name: str
) -> None:
    body: Any = {"model": "auto", "max_tokens": 8, "messages": USER} | change
    with pytest.raises(kind) as caught:
        await client.messages.create(**body)
    shown: Any = caught.value.body
    assert shown["type"] == "error"
    assert shown["error"]["type"] == (name or "invalid_request_error")
    assert shown["request_id"] == caught.value.request_id


async def test_errors_before_any_endpoint_have_the_shape_too(gateway: Gateway) -> None:
    async with served(gateway.app) as url:
        status, raw, _ = await raw_post(url, "/v1/messages/nothing", {})
        assert (status, b'"type":"not_found_error"' in raw) == (404, True)
        status, raw, _ = await raw_post(url, "/v1/messages", {"x": "y" * (3 * 2**20)})
        assert (status, b'"type":"request_too_large"' in raw) == (413, True)


async def test_an_expert_that_breaks_off_is_an_error_event(client: AsyncAnthropic) -> None:
    async with client.messages.stream(model="cut", max_tokens=64, messages=USER) as stream:
        with pytest.raises(anthropic.APIStatusError) as caught:
            await stream.until_done()
    shown: Any = caught.value.body
    assert shown["error"]["code"] == "host_lost"


async def test_the_bytes_of_a_stream_come_in_anthropic_s_order(gateway: Gateway) -> None:
    body = {"model": "caller", "max_tokens": 64, "messages": USER, "tools": TOOLS, "stream": True}
    async with served(gateway.app) as url:
        status, raw, headers = await raw_post(url, "/v1/messages", body)
    events = events_of(raw)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert all(name == data["type"] for name, data in events)
    names = [name for name, _ in events]
    assert names[0] == "message_start"
    assert names[-2:] == ["message_delta", "message_stop"]
    assert b"[DONE]" not in raw
    open_index = None
    for name, data in events[1:-2]:
        if name == "content_block_start":
            assert open_index is None, "one block at a time"
            open_index = data["index"]
        assert data["index"] == open_index
        open_index = None if name == "content_block_stop" else open_index
    assert {data["index"] for _, data in events[1:-2]} == {0, 1}


async def test_pings_while_an_expert_makes_ready(impatient_url: str) -> None:
    body = {"model": "late", "max_tokens": 64, "messages": USER, "stream": True}
    _, raw, headers = await raw_post(impatient_url, "/v1/messages", body)
    assert events_of(raw)[:2] == [("ping", {"type": "ping"})] * 2
    assert headers["request-id"] == headers["x-request-id"]
    async with (
        anthropic_client(impatient_url) as client,
        client.messages.stream(model="late", max_tokens=64, messages=USER) as stream,
    ):
        assert await stream.get_final_text() == "done"
