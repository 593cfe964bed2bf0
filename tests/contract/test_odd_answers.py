"""Answers that no upstream should send: the expert's error, told as any other, and held against it.

What may stand where is decided in ``experts.answer_shape``; here is what becomes of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest

from experts.protocol import CallTimings, ExpertCall, ExpertReply
from gateway.breakers import BreakerRules, expert_target
from gateway.state.breakers import BreakerBoard
from tests.contract.gateway_kit import CASCADE_POLICY, Gateway, make_gateway, spec

USER = [{"role": "user", "content": "hi"}]
PLAIN = """
version: 1
default: odd
fallbacks: [sound]
caps: {stages: 2, cost_usd: 1.0, deadline_ms: 60000}
max_output_tokens_default: 64
"""


def chunk(**choice: Any) -> dict[str, Any]:
    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "odd"}
    return head | {"choices": [{"index": 0, "delta": {}, "finish_reason": None} | choice]}


FIRST, LAST = chunk(delta={"content": "begun"}), chunk(finish_reason="stop")
ODD_CALL = chunk(delta={"tool_calls": ["x"]})
ODD_END = chunk(delta={"tool_calls": ["x"]}, finish_reason="stop")
ODD: dict[str, dict[str, Any]] = {
    "choices": {"choices": 7},
    "choices[0]": {"choices": ["x"]},
    "choices[0].logprobs.content": chunk(logprobs={"content": "x"}),
    "choices[0].message.tool_calls[0]": chunk(message={"tool_calls": ["x"]}),
    "usage.prompt_tokens_details": {**FIRST, "usage": {"prompt_tokens_details": [1]}},
}


class Replaying:
    """Answers with ``events``; each is a network read of its own."""

    def __init__(self, *events: dict[str, Any]) -> None:
        self.events = events
        self.timings = CallTimings()

    async def complete(self, call: ExpertCall) -> ExpertReply:
        return ExpertReply(msgspec.json.decode(msgspec.json.encode(self.events[0])))

    @asynccontextmanager
    async def stream(self, call: ExpertCall) -> AsyncIterator[Replaying]:
        yield self

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for event in self.events:
            yield msgspec.json.encode(event)

    async def aclose(self) -> None:
        return None


def gateway_with(
    folder: Path, *events: dict[str, Any], odd: str = "odd", policy: str = PLAIN, **options: Any
) -> Gateway:
    experts = [spec("draft"), spec("final")] if odd == "draft" else [spec("odd"), spec("sound")]
    backends = {odd: Replaying(*events)}
    return make_gateway(folder, experts, policies={"auto": policy}, backends=backends, **options)


async def ask(gateway: Gateway, path: str = "chat/completions", **body: Any) -> httpx2.Response:
    needed: dict[str, dict[str, Any]] = {
        "responses": {"input": "hi"},
        "messages": {"messages": USER, "max_tokens": 8},
    }
    asked = {"model": "auto", **needed.get(path, {"messages": USER}), **body}
    transport = httpx2.ASGITransport(app=gateway.app)  # raises what nobody handles
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
        return await client.post(f"/v1/{path}", json=asked)


@pytest.mark.parametrize("path", ["messages", "responses"])
@pytest.mark.parametrize("events", [(FIRST, ODD_CALL, LAST), (FIRST, ODD_END)])
async def test_after_the_first_token_it_is_an_event_and_counts_against_the_expert(
    tmp_path: Path, path: str, events: tuple[dict[str, Any], ...]
) -> None:
    board = BreakerBoard(rules=BreakerRules(failures_in_a_row=1))
    gateway = gateway_with(tmp_path, *events, breakers=board)
    answer = await ask(gateway, path, stream=True)
    assert answer.status_code == 200
    assert "begun" in answer.text
    last = answer.text.rstrip("\n").rpartition("\n\n")[2]
    assert last.startswith("event: error" if path == "messages" else "event: response.failed")
    assert "tool_calls[0]" in last
    (stage,) = gateway.journals[0].stages
    assert (stage.verdict, stage.error) == ("failed", "ExpertFailed")
    assert expert_target("odd") in board.tripped()


@pytest.mark.parametrize("field", sorted(ODD))
@pytest.mark.parametrize("stream", [False, True])
async def test_before_it_the_next_stage_answers(tmp_path: Path, field: str, stream: bool) -> None:
    gateway = gateway_with(tmp_path, ODD[field])
    answer = await ask(gateway, stream=stream)
    assert answer.status_code == 200
    assert [stage.verdict for stage in gateway.journals[0].stages] == ["failed", "accept"]


@pytest.mark.parametrize("field", sorted(ODD))
@pytest.mark.parametrize("stream", [False, True])
async def test_a_drafts_too(tmp_path: Path, field: str, stream: bool) -> None:
    gateway = gateway_with(tmp_path, ODD[field], odd="draft", policy=CASCADE_POLICY)
    answer = await ask(gateway, stream=stream)
    assert answer.status_code == 200
    assert [stage.verdict for stage in gateway.journals[0].stages] == ["failed", "accept"]


async def test_with_nobody_left_the_error_names_the_field(tmp_path: Path) -> None:
    gateway = gateway_with(tmp_path, ODD["choices[0]"])
    answer = await ask(gateway, model="odd")
    assert answer.status_code == 502
    assert answer.json()["error"]["code"] == "expert_failed"
    assert "$.choices[0]" in answer.json()["error"]["message"]


def coe_of(event: dict[str, Any]) -> dict[str, Any]:
    """Where each API has it: the last chunk, ``message_delta``, the response object."""
    found: dict[str, Any] = event.get("response", event)["coe"]
    return found


@pytest.mark.parametrize("path", ["chat/completions", "completions", "messages", "responses"])
@pytest.mark.parametrize("usage", [False, True])
async def test_a_stream_that_ends_without_a_word_still_tells_what_it_cost(
    tmp_path: Path, path: str, usage: bool
) -> None:
    """Neither a finish reason nor usage: chunks are counted, as for any stream without usage."""
    spoken = {"text": "begun"} if path == "completions" else {"delta": {"content": "begun"}}
    kind = "text_completion" if path == "completions" else "chat.completion.chunk"
    events = [chunk(**spoken) | {"object": kind} for _ in range(3)]
    gateway = gateway_with(tmp_path, *events)
    more = {"stream_options": {"include_usage": True}} if usage and "compl" in path else {}
    prompt = {"prompt": "hi", "messages": None} if path == "completions" else {}
    answer = await ask(gateway, path, model="odd", stream=True, **prompt, **more)
    told = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    *_, before, last = [msgspec.json.decode(line) for line in told]
    coe = coe_of(before if path == "messages" else last)
    assert (coe["expert"], coe["usage"]["completion_tokens"]) == ("odd", 3)
    assert coe["cost_usd"] == gateway.records[0]["cost_micro_usd"] / 1e6 > 0
    if "compl" in path and not usage:
        (choice,) = last["choices"]
        assert (choice["finish_reason"], last["object"]) == (None, kind)
        assert choice.get("delta", choice.get("text")) in ({}, "")


async def test_arguments_may_be_an_object(tmp_path: Path) -> None:
    """Servers that do not encode them exist; a chat passes them on, a message needs them."""
    call = {"id": "c", "function": {"name": "f", "arguments": {"x": 1}}}
    gateway = gateway_with(tmp_path, chunk(message={"tool_calls": [call]}))
    answer = await ask(gateway, "messages")
    assert answer.json()["content"][0]["input"] == {"x": 1}
