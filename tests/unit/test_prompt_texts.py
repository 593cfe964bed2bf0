"""Whatever a template may print counts as prompt; media do not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.types import Endpoint
from gateway.prompt_texts import texts_within
from gateway.wire import parse_request

WORDS = "some words that cost tokens"
USER = {"role": "user", "content": "hello"}


def chars(**body: Any) -> int:
    raw = json.dumps({"model": "auto", "messages": [USER], **body}).encode()
    return parse_request(raw, Endpoint.CHAT).prompt_chars


def said_by_assistant(**fields: Any) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", "content": None, **fields}]


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": WORDS}}


@pytest.mark.parametrize(
    "body",
    [
        {"messages": said_by_assistant(content=[{"type": "output_text", "text": WORDS}])},
        {"messages": said_by_assistant(content=[{"type": "refusal", "refusal": WORDS}])},
        {"messages": said_by_assistant(content=[{"type": "thinking", "thinking": WORDS}])},
        {"messages": said_by_assistant(content=[{"type": "new", "deep": [{"er": [WORDS]}]}])},
        {"messages": said_by_assistant(reasoning_content=WORDS)},
        {"messages": said_by_assistant(refusal=WORDS)},
        {"messages": said_by_assistant(tool_calls=[CALL])},
        {"messages": said_by_assistant(function_call={"name": "f", "arguments": WORDS})},
        {"messages": [{**USER, "name": WORDS}]},
        {"tools": [{"type": "function", "function": {"name": "f", "description": WORDS}}]},
        {"functions": [{"name": "f", "parameters": {WORDS: {"type": "string"}}}]},
        {"documents": [{"title": "t", "text": WORDS}]},
        {"chat_template_kwargs": {"preamble": WORDS}},
    ],
    ids=lambda body: json.dumps(body)[:60],
)
def test_no_text_of_the_prompt_is_left_out(body: dict[str, Any]) -> None:
    assert chars(**body) >= len(USER["content"]) + len(WORDS)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "file"])
def test_media_are_no_text(kind: str) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": kind, kind: {"data": "A" * 10_000}}]
    assert chars(messages=[{"role": "user", "content": parts}]) == len("hello")


def test_a_plain_message_counts_once() -> None:
    assert chars() == len("hello")
    parts = [{"type": "text", "text": "hello"}]
    assert chars(messages=[{"role": "user", "content": parts, "name": "Bob"}]) == len("helloBob")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=20,
)


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [*value, *(s for inner in value.values() for s in _strings(inner))]
    return [s for inner in value for s in _strings(inner)] if isinstance(value, list) else []


@given(JSON)
def test_every_string_is_found_exactly_once(value: Any) -> None:
    assert sorted(texts_within([value])) == sorted(_strings(value))


def test_deep_nesting_is_no_recursion() -> None:
    value: Any = WORDS
    for _ in range(100_000):
        value = [value]
    assert texts_within(value) == [WORDS]
    while isinstance(value, list):  # taken apart by hand: so is not Python's own way
        value = value[0]
