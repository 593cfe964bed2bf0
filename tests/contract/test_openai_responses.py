"""What OpenAI's official client, strict, sees at /v1/responses, in process and over a socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from tests.contract.api_kit import (
    ARGUMENTS,
    SERVERS,
    Patience,
    api_gateway,
    events_of,
    raw_post,
)
from tests.contract.gateway_kit import Gateway, openai_client, served

TOOLS: list[Any] = [
    {"type": "function", "name": name, "parameters": {"type": "object"}, "strict": False}
    for name in ("weather", "news")
]


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return api_gateway(tmp_path)


@pytest.fixture(params=SERVERS)
async def client(request: Any, gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    if request.param == "in process":
        async with openai_client("http://gateway", gateway.app) as client:
            yield client
        return
    async with served(gateway.app) as url, openai_client(url) as client:
        yield client


async def test_a_plain_response(client: AsyncOpenAI, gateway: Gateway) -> None:
    raw = await client.responses.with_raw_response.create(
        model="auto", instructions="Be brief.", input="one two three", metadata={"a": "b"}
    )
    response = raw.parse()
    assert (response.output_text, response.model, response.status) == (
        "one two three",
        "echo",
        "completed",
    )
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (3, 3)
    assert (response.instructions, response.metadata) == ("Be brief.", {"a": "b"})
    assert (response.model_extra or {})["store"] is False
    assert (response.model_extra or {})["coe"]["expert"] == "echo"
    assert raw.headers["x-coe-cost-usd"] == "0.000009"
    assert gateway.records[-1]["endpoint"] == "responses"


@pytest.mark.parametrize("model", ["echo", "caller", "thinker", "coe/casc"])
async def test_a_streamed_response_is_the_same_response(client: AsyncOpenAI, model: str) -> None:
    ask: Any = {"model": model, "input": "one two three", "tools": TOOLS}
    whole = await client.responses.create(**ask)
    events = [event async for event in await client.responses.create(**ask, stream=True)]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.completed"
    assert _without_ids(last.response.output) == _without_ids(whole.output)
    assert last.response.usage == whole.usage
    assert last.response.model == whole.model


def _without_ids(output: list[Any]) -> list[dict[str, Any]]:
    return [item.to_dict() | {"id": None} for item in output]


async def test_the_client_s_own_accumulator_agrees(client: AsyncOpenAI) -> None:
    async with client.responses.stream(model="caller", input="x", tools=TOOLS) as stream:
        final = await stream.get_final_response()
    calls = [item for item in final.output if item.type == "function_call"]
    assert [(call.name, call.arguments) for call in calls] == [
        ("weather", ARGUMENTS),
        ("news", ARGUMENTS),
    ]


async def test_calls_and_their_outputs_go_back_in(client: AsyncOpenAI) -> None:
    first = await client.responses.create(model="caller", input="x", tools=TOOLS)
    outputs: list[Any] = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
        for item in first.output
        if item.type == "function_call"
    ]
    items: list[Any] = [
        {"role": "user", "content": "x"},
        *(item.to_dict() for item in first.output),
        *outputs,
        {"role": "user", "content": [{"type": "input_text", "text": "and now"}]},
    ]
    again = await client.responses.create(model="echo", input=items, tools=TOOLS)
    assert again.output_text == "and now"


async def test_a_bounded_answer_is_incomplete(client: AsyncOpenAI) -> None:
    response = await client.responses.create(model="tokens", input="x", max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


async def test_log_probabilities_when_included(client: AsyncOpenAI) -> None:
    response = await client.responses.create(
        model="echo", input="one two", include=["message.output_text.logprobs"]
    )
    content: Any = response.output[0].to_dict()["content"]
    assert len(content[0]["logprobs"]) == 2
    silent = await client.responses.create(model="echo", input="one two")
    assert silent.output[0].to_dict()["content"][0]["logprobs"] == []  # type: ignore[index]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"store": True}, "store"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
    ],
)
async def test_what_needs_a_store_or_a_server_s_tool_is_refused_by_name(
    client: AsyncOpenAI, change: dict[str, Any], param: str
) -> None:
    body: Any = {"model": "auto", "input": "x"} | change
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(**body)
    assert caught.value.param == param


async def test_a_prompt_that_fits_nowhere_is_blamed_on_the_field_it_came_in(
    client: AsyncOpenAI,
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(model="auto", input="word " * 20_000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "input")


async def test_an_expert_that_breaks_off_is_a_failed_response(client: AsyncOpenAI) -> None:
    stream = await client.responses.create(model="cut", input="x", stream=True)
    events = [event async for event in stream]
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert (last.response.error.code, (last.response.error.model_extra or {})["cause"]) == (
        "server_error",
        "host_lost",
    )
    with pytest.raises(openai.InternalServerError):
        await client.responses.create(model="broken", input="x", stream=True)


async def test_the_bytes_of_a_stream(gateway: Gateway) -> None:
    async with served(gateway.app) as url:
        body = {"model": "echo", "input": "hi", "stream": True}
        status, raw, _ = await raw_post(url, "/v1/responses", body)
        _, failed, _ = await raw_post(url, "/v1/responses", body | {"model": "nobody"})
    assert status == 200
    events = events_of(raw)
    assert [name for name, _ in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert all(name == data["type"] for name, data in events)
    assert b"[DONE]" not in raw
    assert b'"code":"model_not_found"' in failed


async def test_comments_while_an_expert_makes_ready(tmp_path: Path) -> None:
    body = {"model": "late", "input": "hi", "stream": True}
    async with served(Patience(tmp_path)) as url:
        _, raw, _ = await raw_post(url, "/v1/responses", body)
        _, failed, _ = await raw_post(url, "/v1/responses", body | {"model": "late-broken"})
    assert raw.startswith(b": waiting\n\n: waiting\n\n")
    assert [data["sequence_number"] for _, data in events_of(raw)] == list(range(9))
    assert events_of(failed)[0][1]["code"] == "host_lost"
