"""What the gateway reads out of a request, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.errors import InvalidRequest
from experts.types import Capability, Endpoint
from gateway.wire import ROUTING_CHARS_MAX, WireRequest, parse_request, routing_text

USER = {"role": "user", "content": "hello"}


def chat(**body: Any) -> WireRequest:
    raw = json.dumps({"model": "auto", "messages": [USER]} | body).encode()
    return parse_request(raw, Endpoint.CHAT)


def test_routing_text_is_the_user_s_last_turn_and_nothing_else() -> None:
    last = "Explain how photosynthesis turns light into sugar, step by step, for a ten year old."
    messages = [
        {"role": "system", "content": "You are an SQL expert"},
        {"role": "user", "content": "earlier question"},
        {"role": "assistant", "content": "SELECT 1"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": last},
                {"type": "image_url", "image_url": {"url": "data:,SELECT"}},
            ],
        },
        {"role": "tool", "content": "tool words"},
    ]
    assert routing_text(messages) == last


def test_a_short_turn_brings_the_turns_before_it() -> None:
    messages = [
        {"role": "user", "content": "x" * 700},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "What is the capital of Peru?"},
        {"role": "user", "content": "and of Chile?"},
    ]
    lines = routing_text(messages).split("\n")
    assert lines[1:] == ["What is the capital of Peru?", "and of Chile?"]
    assert set(lines[0]) == {"x"}
    assert len(lines[0]) < 500


def test_a_long_turn_keeps_head_and_tail() -> None:
    text = routing_text([{"role": "user", "content": "HEAD" + "x" * 50_000 + "TAIL"}])
    assert text.startswith("HEAD")
    assert text.endswith("TAIL")
    assert len(text) <= ROUTING_CHARS_MAX + 1


def test_needs_are_read_from_the_request() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:,x"}}
    sound = {"type": "input_audio", "input_audio": {}}
    request = chat(
        messages=[{"role": "user", "content": [image, sound]}],
        tools=[{"type": "function"}],
        logprobs=True,
        response_format={"type": "json_schema"},
    )
    assert request.capabilities == {
        Capability.CHAT,
        Capability.IMAGES,
        Capability.AUDIO,
        Capability.TOOLS,
        Capability.LOGPROBS,
        Capability.JSON_SCHEMA,
    }
    assert chat().capabilities == {Capability.CHAT}


def test_the_tighter_output_bound_counts_and_choices_multiply() -> None:
    request = chat(max_tokens=100, max_completion_tokens=40, n=3)
    assert (request.max_output_tokens, request.choices) == (40, 3)
    raw = json.dumps({"model": "a", "prompt": ["x", "y"], "best_of": 4, "n": 2}).encode()
    assert parse_request(raw, Endpoint.COMPLETIONS).choices == 8
    ids = json.dumps({"model": "a", "prompt": [[1, 2], [3]]}).encode()
    assert parse_request(ids, Endpoint.COMPLETIONS).prompt_ids == 3


def test_parallel_calls_are_a_need_only_when_asked_for_with_tools() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert Capability.PARALLEL_TOOLS in chat(tools=tools, parallel_tool_calls=True).capabilities
    assert Capability.PARALLEL_TOOLS not in chat(tools=tools).capabilities
    assert Capability.PARALLEL_TOOLS not in chat(parallel_tool_calls=True).capabilities
    assert Capability.AUDIO in chat(modalities=["text", "audio"]).capabilities


def test_a_list_of_models_leaves_the_body_and_may_stand_in_for_the_model() -> None:
    request = chat(models=["a", "b", "a"])
    assert (request.model, request.models) == ("auto", ("a", "b"))
    assert "models" not in request.body
    assert chat(model="", models=["a"]).model == "a"
    assert chat(coe={"models": ["x"]}).models == ("x",)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["x", ""]}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "stream": True}, "stream"),
    ],
)
def test_inputs_that_cannot_be_embedded_are_refused(body: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        parse_request(json.dumps({"model": "e"} | body).encode(), Endpoint.EMBEDDINGS)
    assert error.value.field_name == field


def test_coe_options_leave_the_body_and_become_bounds() -> None:
    request = chat(
        coe={
            "max_cost_usd": 0.0000019,
            "deadline_ms": 1500,
            "policy": "cheap",
            "allow": ["a"],
            "deny": ["b"],
            "tags": ["eu"],
            "language": "de-AT",
            "session_id": "s",
            "explain": True,
        }
    )
    assert "coe" not in request.body
    coe = request.coe
    assert coe.overrides.max_cost_micro_usd == 1, "rounded down: a cap is never widened"
    assert (coe.overrides.deadline_ms, coe.policy, coe.explain) == (1500.0, "cheap", True)
    assert (coe.tags, coe.language) == (frozenset({"eu"}), "de")
    assert (coe.allow, coe.deny, coe.session_id) == (frozenset("a"), frozenset("b"), "s")


@pytest.mark.parametrize(
    ("coe", "field"),
    [
        ([], "coe"),
        ({"max_cost_usd": "1"}, "coe.max_cost_usd"),
        ({"max_cost_usd": -1}, "coe.max_cost_usd"),
        ({"allow": "a"}, "coe.allow"),
        ({"session_id": ""}, "coe.session_id"),
        ({"language": "Deutsch!"}, "coe.language"),
        ({"models": []}, "coe.models"),
        ({"explain": 1}, "coe.explain"),
        ({"zzz": 1}, "coe.zzz"),
    ],
)
def test_wrong_coe_options_are_named(coe: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        chat(coe=coe)
    assert error.value.field_name == field


@pytest.mark.parametrize("prompt", [None, [], [1, "a"], [[]], {"a": 1}, [True]])
def test_prompts_of_no_legal_shape_are_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as error:
        parse_request(json.dumps({"model": "a", "prompt": prompt}).encode(), Endpoint.COMPLETIONS)
    assert error.value.field_name == "prompt"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
KNOWN = st.sampled_from(
    (
        *("model", "messages", "prompt", "stream", "stream_options", "n", "best_of", "max_tokens"),
        *("logprobs", "top_logprobs", "tools", "stop", "temperature", "response_format", "coe"),
        *("models", "input", "encoding_format", "dimensions", "modalities", "parallel_tool_calls"),
    )
)


def taken_or_refused(raw: bytes, endpoint: Endpoint) -> WireRequest | str:
    """The request, or the top-level field that the refusal names."""
    try:
        return parse_request(raw, endpoint)
    except InvalidRequest as error:
        return (error.field_name or "").split(".")[0].split("[")[0]


@given(body=st.dictionaries(KNOWN, JSON), endpoint=st.sampled_from(Endpoint))
def test_any_json_is_either_taken_or_refused_by_name(
    body: dict[str, Any], endpoint: Endpoint
) -> None:
    full = {"model": "auto", "messages": [USER], "prompt": "x", "input": "x"} | body
    result = taken_or_refused(json.dumps(full).encode(), endpoint)
    if isinstance(result, str):
        assert result in {*full, ""}
    else:
        assert {k: v for k, v in full.items() if k not in ("coe", "models")} == result.body


@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "system", "assistant"]), "content": JSON},
            optional={"tool_calls": JSON},
        ),
        min_size=1,
        max_size=4,
    )
)
def test_any_message_content_is_taken_or_refused(messages: list[dict[str, Any]]) -> None:
    raw = json.dumps({"model": "auto", "messages": messages}).encode()
    result = taken_or_refused(raw, Endpoint.CHAT)
    assert result == "messages" or isinstance(result, WireRequest)
