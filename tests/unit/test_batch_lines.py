"""Batch file formats: what is refused and why, and that bodies pass through untouched."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.batch_lines import (
    Answer,
    LineRefused,
    Lost,
    answer_line,
    is_torn_line,
    lost_line,
    parse_request_line,
    read_output_line,
)

BODY: dict[str, Any] = {"model": "auto", "messages": [{"role": "user", "content": "hi"}]}
LINE: dict[str, Any] = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": BODY,
}


def encoded(**changes: Any) -> bytes:
    return json.dumps({k: v for k, v in (LINE | changes).items() if v is not None}).encode()


def test_the_body_keeps_every_byte() -> None:
    body = b'{ "model":"auto", "messages" : [], "temperature":1.50, "seed":123456789012345678901 }'
    raw = b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":' + body + b"}\n"
    line = parse_request_line(raw)
    assert (line.custom_id, line.url, line.model, line.body) == (
        "a",
        "/v1/chat/completions",
        "auto",
        body,
    )


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "truncated"),
        (b"[]", "Expected `object`"),
        (b'{"custom_id":"\xff"}', "UTF-8"),
        (encoded(custom_id=None), "custom_id"),
        (encoded(custom_id=7), "custom_id"),
        (encoded(custom_id=""), "custom_id"),
        (encoded(custom_id="x" * 513), "custom_id"),
        (encoded(method="GET"), "method: 'GET' is not supported"),
        (encoded(url="/v1/embeddings"), "url: '/v1/embeddings' is not supported"),
        (encoded(body=[1]), "body: Expected `object`"),
        (encoded(body={"messages": []}), "model"),
        (encoded(body=BODY | {"model": ""}), "body.model"),
        (encoded(body=BODY | {"stream": True}), "body.stream"),
        (encoded(body={"model": "auto", "prompt": "hi"}), "messages is required"),
        (encoded(url="/v1/completions"), "prompt is required"),
    ],
)
def test_a_wrong_line_says_why(raw: bytes, reason: str) -> None:
    with pytest.raises(LineRefused) as refused:
        parse_request_line(raw)
    assert reason in str(refused.value)


def test_an_answer_line_has_openais_fields_and_reads_back() -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 4}
    body = {"id": "x", "coe": {"expert": "sql", "cost_usd": 0.000011, "usage": usage}}
    answer = Answer(200, "req-1", json.dumps(body, indent=1).encode())
    raw = answer_line("batch_req_1", "a", answer)
    assert raw.count(b"\n") == 1
    assert json.loads(raw) == {
        "id": "batch_req_1",
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "req-1", "body": body},
        "error": None,
    }
    custom_id, charge = read_output_line(raw)
    assert (custom_id, charge.expert, charge.ok) == ("a", "sql", True)
    assert (charge.input_tokens, charge.output_tokens, charge.cost_micro_usd) == (3, 4, 11)


def test_a_failure_that_cost_money_says_so() -> None:
    error = {"error": {"message": "no", "code": "host_lost"}}
    answer = Answer(502, "r", json.dumps(error).encode(), expert="sql", cost_micro_usd=7)
    raw = answer_line("batch_req_1", "a", answer)
    assert json.loads(raw)["response"]["body"] == error
    _, charge = read_output_line(raw)
    assert (charge.ok, charge.expert, charge.cost_micro_usd) == (False, "sql", 7)


def test_a_proxys_page_and_a_lost_connection_are_failures() -> None:
    page = answer_line("batch_req_1", "a", Answer(200, "", b"<html>"))
    assert json.loads(page)["response"]["body"] == "<html>"
    assert not read_output_line(page)[1].ok
    lost = lost_line("batch_req_1", "a", Lost("reset"))
    assert json.loads(lost)["error"] == {"code": "connection_lost", "message": "reset"}
    assert not read_output_line(lost)[1].ok


def test_only_the_beginning_of_a_line_of_ours_counts_as_torn() -> None:
    whole = lost_line("batch_req_1", "a", Lost("x"))
    assert all(is_torn_line(whole[:n]) for n in range(1, len(whole)))
    assert is_torn_line(b"\0\0\0")
    assert not is_torn_line(b"shopping list: bread")
    assert not is_torn_line(b'{"name": "somebody else\'s data"')
