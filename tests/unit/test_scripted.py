"""Scripts are read strictly and answer the same way every time."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from experts.errors import ConfigError
from experts.protocol import ExpertCall
from experts.scripted import Script, ScriptedBackend, render_chunks, render_reply
from experts.types import Endpoint

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "one two three"}]}


def test_a_script_is_read_from_text_and_options() -> None:
    script = Script.parse("tokens?count=3&pace_ms=1.5", {"confidence": 0.5})
    assert (script.behaviour, script.count, script.pace_ms) == ("tokens", 3, 1.5)
    assert script.logprob == pytest.approx(math.log(0.5))


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("sing", "behaviour"),
        ("tokens?cuont=3", "cuont"),
        ("tokens?count=many", "count"),
        ("echo?confidence=0", "confidence"),
        ("echo?confidence=1.5", "confidence"),
    ],
)
def test_a_wrong_script_is_refused_by_name(text: str, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        Script.parse(text)
    assert error.value.key == key


@pytest.mark.parametrize(
    ("request_body", "text", "reason"),
    [
        ({}, "one two three", "stop"),
        ({"max_tokens": 2}, "one two ", "length"),
        ({"max_tokens": 3}, "one two three", "stop"),
        ({"stop": "two"}, "one ", "stop"),
        ({"stop": ["zzz", "three"], "max_tokens": 1}, "one ", "length"),
    ],
)
@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
def test_bounds_of_the_request_are_kept(
    endpoint: Endpoint, request_body: dict[str, Any], text: str, reason: str
) -> None:
    body = (BODY if endpoint is Endpoint.CHAT else {"prompt": "one two three"}) | request_body
    choice = render_reply(Script(), endpoint, body, "m")["choices"][0]
    whole = choice["message"]["content"] if endpoint is Endpoint.CHAT else choice["text"]
    assert (whole, choice["finish_reason"]) == (text, reason)
    chunks = [msgspec.json.decode(c) for c in render_chunks(Script(), endpoint, body, "m")]
    assert chunks[-1]["choices"][0]["finish_reason"] == reason
    parts = [c["choices"][0] for c in chunks]
    assert "".join(p["delta"].get("content", "") if "delta" in p else p["text"] for p in parts) == (
        text
    )


def test_calls_and_thoughts_come_in_pieces_that_add_up() -> None:
    script = Script.parse("tool_calls?reasoning=hm", {"arguments": '{"a": 1}'})
    tools = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]
    body = BODY | {"tools": tools}
    message = render_reply(script, Endpoint.CHAT, body, "m")["choices"][0]["message"]
    chunks = [msgspec.json.decode(c) for c in render_chunks(script, Endpoint.CHAT, body, "m")]
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert [d["reasoning_content"] for d in deltas if "reasoning_content" in d] == ["hm"]
    assert message["reasoning_content"] == "hm"
    sent = ["", ""]
    for delta in deltas:
        for call in delta.get("tool_calls", ()):
            sent[call["index"]] += call["function"]["arguments"]
    assert sent == [call["function"]["arguments"] for call in message["tool_calls"]]


def test_embeddings_depend_on_the_text_alone() -> None:
    body = {"input": ["x", "y", "x"], "dimensions": 4}
    one, other, again = (
        item["embedding"] for item in render_reply(Script(), Endpoint.EMBEDDINGS, body, "m")["data"]
    )
    assert one == again != other
    assert math.hypot(*one) == pytest.approx(1.0)


async def test_the_pace_is_slept_between_tokens_not_before_the_first() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    backend = ScriptedBackend(Script.parse("tokens?count=3&pace_ms=10&delay_ms=50"), sleep=sleep)
    call = ExpertCall("x", Endpoint.CHAT, BODY, "r", 1e3, 1e3, 1e3)
    async with backend.stream(call) as stream:
        seen = [payload async for payload in stream]
    assert len(seen) == 4, "three tokens and the finishing chunk"
    assert slept == [0.05, 0.01, 0.01, 0.01]
