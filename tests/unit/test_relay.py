"""Chunks pass untouched unless something in them would be wrong."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from experts.types import Usage
from gateway.choice_logprobs import ChoiceLogprobs
from gateway.relay import ChunkRelay, usage_of

COE = {"expert": "x"}


def chunk(content: str | None = None, **changes: Any) -> bytes:
    delta = {} if content is None else {"content": content}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    head = {"id": "1", "object": "chat.completion.chunk", "created": 5, "model": "x"}
    choice |= {k: changes.pop(k) for k in ("logprobs", "finish_reason") if k in changes}
    return msgspec.json.encode(head | {"choices": [choice]} | changes)


def relay(**changes: Any) -> ChunkRelay:
    settings = {"rename": False, "hide_logprobs": False, "include_usage": False}
    return ChunkRelay(expert="x", **settings | changes)


def test_middle_chunks_are_the_very_same_bytes() -> None:
    odd = b'{ "id":"1", "choices":[ {"delta":{"content":"\\u00e9 \\"usage\\": {"}} ], "model":"x"}'
    passing = relay()
    first, middle = passing.feed([chunk("a"), odd], COE)
    assert msgspec.json.decode(first)["coe"] == COE
    assert middle is odd


def test_the_finishing_chunk_waits_and_carries_the_totals() -> None:
    passing = relay()
    passing.feed([chunk("a")], COE)
    assert passing.feed([chunk(finish_reason="stop")], None) == []
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert passing.feed([chunk(choices=[], usage=usage)], None) == []
    assert passing.usage == Usage(3, 2)
    (last,) = passing.finish(Usage(3, 2), {"cost_usd": 1})
    body = msgspec.json.decode(last)
    assert (body["coe"], body["choices"][0]["finish_reason"]) == ({"cost_usd": 1}, "stop")
    assert "usage" not in body


def test_with_several_choices_no_chunk_is_reordered() -> None:
    passing = relay()
    passing.feed([chunk("a")], COE)
    early, late = chunk(finish_reason="stop"), chunk("b")
    assert passing.feed([early, late], None) == [early, late]


def test_usage_is_made_up_from_the_count_when_upstream_sends_none() -> None:
    passing = relay(include_usage=True)
    passing.feed([chunk("a"), chunk(finish_reason="stop")], COE)
    kept, last = map(msgspec.json.decode, passing.finish(Usage(3, 2), COE))
    assert kept["choices"][0]["finish_reason"] == "stop"
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert (last["id"], last["model"], last["coe"]) == ("1", "x", COE)


@pytest.mark.parametrize("kind", ["chat.completion.chunk", "text_completion"])
def test_a_stream_that_does_not_say_how_it_ended_gets_a_last_chunk_for_the_totals(
    kind: str,
) -> None:
    passing = relay()
    passing.feed([chunk("a", object=kind), chunk("b", object=kind)], COE)
    (last,) = map(msgspec.json.decode, passing.finish(Usage(3, 2), {"cost_usd": 1}))
    (choice,) = last["choices"]
    said = {"text": ""} if kind == "text_completion" else {"delta": {}}
    assert choice == {"index": 0, "logprobs": None, "finish_reason": None, **said}
    assert (last["id"], last["object"], last["model"]) == ("1", kind, "x")
    assert last["coe"] == {"cost_usd": 1}
    assert passing.chunks == 2, "it is none of the expert's"


def test_so_does_one_that_goes_on_after_its_end() -> None:
    passing = relay()
    passing.feed([chunk("a"), chunk(finish_reason="stop"), chunk()], COE)
    (last,) = map(msgspec.json.decode, passing.finish(Usage(3, 2), {"cost_usd": 1}))
    assert last["coe"] == {"cost_usd": 1}


@pytest.mark.parametrize("announced", [True, False])
def test_another_model_name_is_corrected_everywhere(announced: bool) -> None:
    passing = relay(rename=announced)
    out = passing.feed([chunk("a", model="up"), chunk("b", model="up")], COE)
    assert [msgspec.json.decode(p)["model"] for p in out] == ["x", "x"]


def test_logprobs_we_asked_for_are_hidden() -> None:
    passing = relay(hide_logprobs=True)
    logprobs = {"content": [{"token": "a", "logprob": -0.5}]}
    out = passing.feed([chunk("a", logprobs=logprobs), chunk("b", logprobs=logprobs)], COE)
    assert [msgspec.json.decode(p)["choices"][0]["logprobs"] for p in out] == [None, None]


def test_logprobs_of_both_endpoints_are_read() -> None:
    chat = {"choices": [{"logprobs": {"content": [{"logprob": -1}, {"logprob": -2.0}]}}]}
    text = {"choices": [{"logprobs": {"token_logprobs": [None, -1.0]}}]}
    assert weakest(chat) == (-3.0, 2)
    assert weakest(text) == (-1.0, 1)


def test_several_choices_are_judged_by_the_weakest() -> None:
    sure = {"index": 0, "logprobs": {"content": [{"logprob": -0.1}] * 9}}
    doubtful = {"index": 1, "logprobs": {"content": [{"logprob": -2.0}] * 3}}
    assert weakest({"choices": [sure, doubtful]}) == (-6.0, 3)
    stream = ChoiceLogprobs(choices=2)
    stream.add({"choices": [sure]})
    assert stream.weakest() == (0.0, 0), "the other choice has said nothing yet"
    stream.add({"choices": [doubtful | {"finish_reason": "stop"}]})
    assert stream.weakest() == (-18.0, 9), "a choice that ended keeps no window open"


def weakest(body: dict[str, Any]) -> tuple[float, int]:
    logprobs = ChoiceLogprobs(choices=0)
    logprobs.add(body)
    return logprobs.weakest()


NEGATIVE = {"prompt_tokens": -1, "completion_tokens": 2}


@pytest.mark.parametrize("usage", [None, 3, {}, {"prompt_tokens": "1"}, NEGATIVE])
def test_usage_of_another_shape_is_none(usage: Any) -> None:
    assert usage_of({"usage": usage}) is None
