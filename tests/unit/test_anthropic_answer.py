"""Chat answers as Anthropic messages: what a message says about why it ended."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.anthropic_answer import message_of

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def ended(finish_reason: str, message: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    choice = {"index": 0, "finish_reason": finish_reason, "message": message, **more}
    whole = message_of(
        {"model": "m", "choices": [choice]}, message_id="msg_1", prompt_tokens=3, thinking=False
    )
    return whole["stop_reason"], whole["stop_sequence"]


@pytest.mark.parametrize(
    ("finish_reason", "message", "more", "expected"),
    [
        ("stop", {"content": "hi"}, {}, ("end_turn", None)),
        ("tool_calls", {"tool_calls": [CALL]}, {}, ("tool_use", None)),
        # OpenAI and vLLM say "stop" of a call that the request forced by name.
        ("stop", {"tool_calls": [CALL]}, {}, ("tool_use", None)),
        ("stop", {"content": "hi", "tool_calls": [CALL]}, {}, ("tool_use", None)),
        ("length", {"tool_calls": [CALL]}, {}, ("max_tokens", None)),
        ("stop", {"content": "hi"}, {"stop_reason": "END"}, ("stop_sequence", "END")),
        ("stop", {"refusal": "no"}, {}, ("refusal", None)),
    ],
)
def test_the_stop_reason_is_what_anthropic_would_say(
    finish_reason: str, message: dict[str, Any], more: dict[str, Any], expected: tuple[Any, Any]
) -> None:
    assert ended(finish_reason, {"role": "assistant", **message}, **more) == expected
