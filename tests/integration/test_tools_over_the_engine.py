"""Tools on a hosted expert: what the official clients get when a real engine calls one.

The expert is too small to want a tool by itself, so each request forces the call, or its text. What
is tested is the way: offered tools in, calls out, in every dialect, streamed and whole.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest

from tests.integration.stack import Stack, launch, quickstart_is_prepared, wait_ready, write_config

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.timeout(600)]

CITIES = ["Paris", "Rome"]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": CITIES}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather by city",
        "parameters": SCHEMA,
        "strict": True,  # else the engine only sees to it that the arguments are JSON
    },
}
ASK: Any = {
    "model": "auto",
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    "tools": [TOOL],
    "max_tokens": 64,
    "temperature": 0,
}
BY_NAME: Any = {"type": "function", "function": {"name": "get_weather"}}
POLICY = "version: 1\ndefault: general\ncaps: {cost_usd: 1.0}\n"


def _expert(parser: str) -> dict[str, object]:
    return {
        "source": {"path": "cache:quickstart/general"},
        "price": {"input_usd_per_mtok": 0.02, "output_usd_per_mtok": 0.06},
        "context_tokens": 2048,
        "capabilities": ["chat", "completions", "json_schema", "tools"],
        "tool_call_parser": parser,
    }


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    assert quickstart_is_prepared(), "run `make models` first"
    folder = tmp_path_factory.mktemp("tools")
    (folder / "policies").mkdir()
    (folder / "policies" / "auto.yaml").write_text(POLICY)
    experts = {"general": _expert("hermes"), "odd": _expert("unheard-of")}
    config = write_config(
        folder,
        experts=experts,
        hosts=[{"name": "local", "experts": ["general", "odd"]}],
        policies={"dir": "policies"},
    )
    running = launch(config, folder)
    try:
        yield wait_ready(running)
    finally:
        if running.process.poll() is None:
            running.stop(signal.SIGKILL)


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=stack.url, api_key="unused", max_retries=0, _strict_response_validation=True
    ) as opened:
        yield opened


@pytest.mark.parametrize("choice", [BY_NAME, "required"])
def test_a_call_that_is_asked_for_comes_as_a_call(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(**ASK, tool_choice=choice)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments)["city"] in CITIES


@pytest.mark.parametrize("choice", [BY_NAME, "required"])
def test_a_streamed_call_comes_in_pieces_of_one_call(client: openai.OpenAI, choice: Any) -> None:
    name, arguments, ids = "", "", set()
    for chunk in client.chat.completions.create(**ASK, tool_choice=choice, stream=True):
        for piece in (chunk.choices[0].delta.tool_calls or ()) if chunk.choices else ():
            assert piece.index == 0
            ids |= {piece.id} - {None}
            if piece.function is not None:
                name += piece.function.name or ""
                arguments += piece.function.arguments or ""
    assert name == "get_weather"
    assert json.loads(arguments)["city"] in CITIES
    assert len(ids) == 1


def test_the_way_the_expert_writes_calls_is_read_by_its_parser(client: openai.OpenAI) -> None:
    """The text is forced, as a model that knows the format would write it of its own accord."""
    call = {"name": "get_weather", "arguments": {"city": "Rome"}}
    loose = {**TOOL, "function": {**TOOL["function"], "strict": False}}  # else its schema decides
    written = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
    answer = client.chat.completions.create(
        **ASK | {"tools": [loose]}, extra_body={"structured_outputs": {"choice": [written]}}
    )
    (choice,) = answer.choices
    (found,) = choice.message.tool_calls or ()
    assert (found.type, found.function.name) == ("function", "get_weather")
    assert json.loads(found.function.arguments) == {"city": "Rome"}
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content


def test_a_call_and_its_result_go_back_to_the_expert(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(**ASK, tool_choice=BY_NAME).choices[0].message
    (call,) = first.tool_calls or ()
    result = {"role": "tool", "tool_call_id": call.id, "content": "12 degrees, rain"}
    messages = [*ASK["messages"], first.to_dict(), result]
    answer = client.chat.completions.create(**ASK | {"messages": messages}, tool_choice="none")
    assert answer.choices[0].message.content
    assert not answer.choices[0].message.tool_calls


def test_the_messages_api_gives_a_tool_use_block(stack: Stack) -> None:
    tool = {"name": "get_weather", "input_schema": SCHEMA, "strict": True}
    ask: Any = {
        "model": "auto",
        "messages": ASK["messages"],
        "max_tokens": 64,
        "tools": [tool],
        "tool_choice": {"type": "tool", "name": "get_weather"},
    }
    with anthropic.Anthropic(
        base_url=stack.url.removesuffix("/v1"),
        api_key="unused",
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        whole = client.messages.create(**ask)
        with client.messages.stream(**ask) as stream:
            streamed = stream.get_final_message()
    for answer in (whole, streamed):
        (block,) = [one for one in answer.content if one.type == "tool_use"]
        assert block.name == "get_weather"
        assert block.input["city"] in CITIES
        assert answer.stop_reason == "tool_use"


def test_the_responses_api_gives_a_function_call(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": True}
    body: Any = {
        "model": "auto",
        "input": ASK["messages"][0]["content"],
        "tools": [tool],
        "tool_choice": {"type": "function", "name": "get_weather"},
        "max_output_tokens": 64,
    }
    whole = client.responses.create(**body)
    events = list(client.responses.create(**body, stream=True))
    last = events[-1]
    assert last.type == "response.completed"
    for answer in (whole, last.response):
        (call,) = [item for item in answer.output if item.type == "function_call"]
        assert call.name == "get_weather"
        assert json.loads(call.arguments)["city"] in CITIES


def test_an_expert_whose_parser_there_is_not_is_out_of_service_and_says_why(
    stack: Stack, client: openai.OpenAI
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**ASK | {"model": "odd"})
    assert caught.value.status_code == 503
    assert "unheard-of" in stack.text()
