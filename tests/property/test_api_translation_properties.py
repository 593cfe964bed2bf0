"""Translations between APIs lose no text and no tool, whatever the request or the answer holds."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.errors import InvalidRequest
from experts.types import Endpoint
from gateway.answer_blocks import BlockKind, BlockSequencer
from gateway.anthropic_answer import UNPARSED, MessageStream, message_of
from gateway.anthropic_request import chat_body as from_anthropic
from gateway.responses_answer import ResponsesStream, response_of
from gateway.responses_request import chat_body as from_responses
from gateway.wire import parse_body

TEXT = st.text(max_size=12)
WORDS = st.text(min_size=1, max_size=12)
NAME = st.text("abcdefgh_", min_size=1, max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=3)
TOOL = st.tuples(NAME, TEXT, OBJECT)

# --- requests ------------------------------------------------------------------------------------

ANTHROPIC_USER = st.lists(
    st.builds(lambda t: {"type": "text", "text": t}, WORDS)
    | st.builds(lambda i, t: {"type": "tool_result", "tool_use_id": i, "content": t}, NAME, TEXT),
    min_size=1,
    max_size=4,
)
ANTHROPIC_ASSISTANT = st.lists(
    st.builds(lambda t: {"type": "text", "text": t}, WORDS)
    | st.builds(
        lambda i, n, o: {"type": "tool_use", "id": i, "name": n, "input": o}, NAME, NAME, OBJECT
    ),
    min_size=1,
    max_size=4,
)
ANTHROPIC_MESSAGES = st.lists(
    st.builds(lambda c: {"role": "user", "content": c}, ANTHROPIC_USER)
    | st.builds(lambda c: {"role": "assistant", "content": c}, ANTHROPIC_ASSISTANT),
    min_size=1,
    max_size=4,
)


def chat_texts(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or () if part["type"] == "text")


def chat_calls(messages: list[dict[str, Any]]) -> list[tuple[str, str, Any]]:
    return [
        (call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))
        for message in messages
        for call in message.get("tool_calls") or ()
    ]


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(messages=ANTHROPIC_MESSAGES, tools=st.lists(TOOL, max_size=3), extra=OBJECT)
def test_an_anthropic_request_keeps_texts_calls_results_tools_and_unknown_fields(
    messages: list[dict[str, Any]], tools: list[tuple[str, str, Any]], extra: dict[str, Any]
) -> None:
    unknown = {f"x_{key}": value for key, value in extra.items()}
    asked = {"model": "m", "max_tokens": 5, "messages": messages} | unknown
    if tools:
        asked["tools"] = [{"name": n, "description": d, "input_schema": s} for n, d, s in tools]
    body = from_anthropic(asked)
    blocks = [(m["role"], b) for m in messages for b in m["content"]]
    for role in ("user", "assistant"):
        said = "".join(b["text"] for r, b in blocks if r == role and b["type"] == "text")
        assert said == "".join(chat_texts(m) for m in body["messages"] if m["role"] == role)
    assert chat_calls(body["messages"]) == [
        (b["id"], b["name"], b["input"]) for _, b in blocks if b["type"] == "tool_use"
    ]
    assert [(m["tool_call_id"], m["content"]) for m in body["messages"] if m["role"] == "tool"] == [
        (b["tool_use_id"], b["content"]) for _, b in blocks if b["type"] == "tool_result"
    ]
    functions = [tool["function"] for tool in body.get("tools", ())]
    assert [(f["name"], f["description"], f["parameters"]) for f in functions] == tools
    assert {key: body[key] for key in unknown} == unknown
    parse_body(body, Endpoint.CHAT)


RESPONSES_ITEMS = st.lists(
    st.builds(
        lambda r, t: {"role": r, "content": t},
        st.sampled_from(["user", "assistant", "system", "developer"]),
        WORDS,
    )
    | st.builds(
        lambda ts: {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": t} for t in ts],
        },
        st.lists(WORDS, min_size=1, max_size=3),
    )
    | st.builds(
        lambda i, n, o: {
            "type": "function_call",
            "call_id": i,
            "name": n,
            "arguments": json.dumps(o),
        },
        NAME,
        NAME,
        OBJECT,
    )
    | st.builds(
        lambda i, t: {"type": "function_call_output", "call_id": i, "output": t}, NAME, TEXT
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(items=RESPONSES_ITEMS, tools=st.lists(TOOL, max_size=3), extra=OBJECT)
def test_a_responses_request_keeps_texts_calls_outputs_tools_and_unknown_fields(
    items: list[dict[str, Any]], tools: list[tuple[str, str, Any]], extra: dict[str, Any]
) -> None:
    unknown = {f"x_{key}": value for key, value in extra.items()}
    asked = {"model": "m", "input": items} | unknown
    asked["tools"] = [
        {"type": "function", "name": n, "description": d, "parameters": s} for n, d, s in tools
    ]
    body = from_responses(asked)
    for role in ("user", "assistant", "system", "developer"):
        said = "".join(_item_text(item) for item in items if item.get("role") == role)
        assert said == "".join(chat_texts(m) for m in body["messages"] if m["role"] == role)
    assert chat_calls(body["messages"]) == [
        (item["call_id"], item["name"], json.loads(item["arguments"]))
        for item in items
        if item.get("type") == "function_call"
    ]
    assert [(m["tool_call_id"], m["content"]) for m in body["messages"] if m["role"] == "tool"] == [
        (item["call_id"], item["output"])
        for item in items
        if item.get("type") == "function_call_output"
    ]
    functions = [tool["function"] for tool in body.get("tools", ())]
    assert [(f["name"], f["description"], f["parameters"]) for f in functions] == tools
    assert {key: body[key] for key in unknown} == unknown
    parse_body(body, Endpoint.CHAT)


def _item_text(item: dict[str, Any]) -> str:
    content = item["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


KEYS = st.sampled_from(
    (
        *("model", "messages", "input", "instructions", "system", "tools", "tool_choice", "text"),
        *("max_tokens", "max_output_tokens", "stop_sequences", "metadata", "thinking", "include"),
        *("reasoning", "output_config", "top_logprobs", "stream", "store", "truncation"),
    )
)


NEARLY = st.recursive(
    JSON | st.sampled_from(["user", "assistant", "text", "tool_use", "message", "function_call"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "source", "input", "name", "id"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(body=st.dictionaries(KEYS, JSON | NEARLY | st.lists(NEARLY, max_size=2)))
def test_any_json_is_translated_or_refused(body: dict[str, Any]) -> None:
    for translate in (from_anthropic, from_responses):
        with contextlib.suppress(InvalidRequest):
            request = parse_body(translate(body), Endpoint.CHAT)
            assert request.message_count > 0


# --- answers -------------------------------------------------------------------------------------

# Pieces of an answer in any interleaving, as chat deltas.
PIECES = st.lists(
    st.tuples(st.sampled_from(["content", "reasoning_content", "refusal"]), TEXT)
    | st.tuples(st.integers(0, 2), TEXT),
    max_size=12,
)


def chunks_of(pieces: list[tuple[Any, str]]) -> list[dict[str, Any]]:
    """One chunk per piece; a tool's first chunk carries its id and name, as servers send it."""
    opened: set[int] = set()
    chunks: list[dict[str, Any]] = []
    for kind, text in pieces:
        if isinstance(kind, str):
            delta: dict[str, Any] = {kind: text}
        else:
            call: dict[str, Any] = {"index": kind, "function": {"arguments": text}}
            if kind not in opened:
                call["id"] = f"call_{kind}"
                call["function"]["name"] = f"tool_{kind}"
                opened.add(kind)
            delta = {"tool_calls": [call]}
        chunks.append({"model": "m", "choices": [{"index": 0, "delta": delta}]})
    end = {"index": 0, "delta": {}, "finish_reason": "tool_calls" if opened else "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    return [*chunks, {"model": "m", "choices": [end]}, {"choices": [], "usage": usage}]


def whole_of(pieces: list[tuple[Any, str]]) -> dict[str, Any]:
    """The same answer as a whole body."""
    message: dict[str, Any] = {"role": "assistant"}
    for kind in ("content", "reasoning_content", "refusal"):
        message[kind] = "".join(text for k, text in pieces if k == kind) or None
    order = dict.fromkeys(kind for kind, _ in pieces if isinstance(kind, int))
    message["tool_calls"] = [
        {
            "id": f"call_{index}",
            "index": 0,  # as some servers number every call of a whole answer
            "type": "function",
            "function": {
                "name": f"tool_{index}",
                "arguments": "".join(text for k, text in pieces if k == index),
            },
        }
        for index in order
    ]
    reason = "tool_calls" if order else "stop"
    choice = {"index": 0, "message": message, "finish_reason": reason}
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    return {"model": "m", "choices": [choice], "usage": usage}


@given(PIECES)
def test_blocks_come_one_at_a_time_and_hold_everything(pieces: list[tuple[Any, str]]) -> None:
    blocks = BlockSequencer()
    steps = [s for c in chunks_of(pieces)[:-1] for s in blocks.feed_choice(c["choices"][0])]
    steps += blocks.finish()
    running: int | None = None
    for step in steps:
        name = type(step).__name__
        assert (running is None) == (name == "Opened"), "one block at a time"
        assert running in (None, step.block.index)
        running = None if name == "Closed" else step.block.index
    assert running is None
    for kind, key in ((BlockKind.TEXT, "content"), (BlockKind.REASONING, "reasoning_content")):
        said = "".join(block.text for block in blocks.blocks if block.kind is kind)
        assert said == "".join(text for k, text in pieces if k == key)
    tools = {b.call_id: b.text for b in blocks.blocks if b.kind is BlockKind.TOOL}
    named = {index for index, _ in pieces if isinstance(index, int)}
    assert tools == {
        f"call_{index}": "".join(text for k, text in pieces if k == index) for index in named
    }


@given(PIECES)
def test_streamed_and_whole_messages_say_the_same(pieces: list[tuple[Any, str]]) -> None:
    whole = message_of(whole_of(pieces), message_id="m", prompt_tokens=3, thinking=True)
    stream = MessageStream(message_id="m", request_id="r", prompt_tokens=lambda: 3, thinking=True)
    events = [e for c in chunks_of(pieces) for e in stream.feed(c)] + [*stream.finish()]
    assert events[0]["type"] == "message_start"
    assert [e["type"] for e in events[-2:]] == ["message_delta", "message_stop"]
    streamed = stream.message()
    assert streamed["usage"] == whole["usage"] == events[-2]["usage"]
    assert streamed["stop_reason"] == whole["stop_reason"]
    for kind, field in (("text", "text"), ("thinking", "thinking")):
        assert _said(streamed, kind, field) == _said(whole, kind, field)
    assert _calls(streamed) == _calls(whole)


def _said(message: dict[str, Any], kind: str, field: str) -> str:
    """Texts in a row; text and a refusal may stand in either order, so compare the letters."""
    return "".join(sorted("".join(b[field] for b in message["content"] if b["type"] == kind)))


def _calls(message: dict[str, Any]) -> list[tuple[str, str]]:
    return sorted(
        (block["id"], json.dumps(block["input"], sort_keys=True))
        for block in message["content"]
        if block["type"] == "tool_use"
    )


@given(PIECES)
def test_streamed_and_whole_responses_say_the_same(pieces: list[tuple[Any, str]]) -> None:
    whole = response_of(whole_of(pieces), {}, tag="t", created_s=1)
    stream = ResponsesStream({}, tag="t", created_s=1)
    raw = b"".join(stream.write([msgspec.json.encode(c)]) for c in chunks_of(pieces))
    raw += stream.end()
    events = [msgspec.json.decode(b.split(b"\ndata: ")[1]) for b in raw[:-2].split(b"\n\n")]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    final = events[-1]["response"]
    assert (final["status"], final["usage"]) == (whole["status"], whole["usage"])
    assert _output_calls(final) == _output_calls(whole)
    deltas: dict[int, str] = {}
    for event in events:
        if event["type"].endswith(".delta"):
            index = event["output_index"]
            deltas[index] = deltas.get(index, "") + event["delta"]
    for index, item in enumerate(final["output"]):
        assert _item_body(item) == deltas.get(index, "")


def _output_calls(response: dict[str, Any]) -> list[tuple[str, str]]:
    return sorted(
        (item["call_id"], item["arguments"])
        for item in response["output"]
        if item["type"] == "function_call"
    )


def _item_body(item: dict[str, Any]) -> str:
    if item["type"] == "function_call":
        return str(item["arguments"])
    part = item["content"][0]
    return str(part.get("text", part.get("refusal")))


def test_arguments_that_are_no_object_are_kept_as_text() -> None:
    body = whole_of([(0, '{"cut": "sho')])
    message = message_of(body, message_id="m", prompt_tokens=1, thinking=False)
    assert message["content"][0]["input"] == {UNPARSED: '{"cut": "sho'}
