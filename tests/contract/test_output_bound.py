"""What was reserved for is what the expert is told, in every spelling and on every endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest

from experts.protocol import ExpertCall, ExpertReply
from experts.types import Price
from tests.contract.gateway_kit import PLAIN_POLICY, make_gateway, spec

PRICE = Price(0, 2_000_000)  # two micro-dollars for a token of output
MESSAGES = [{"role": "user", "content": "hi"}]
ASKED: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": MESSAGES},
    "completions": {"prompt": "hi"},
    "messages": {"messages": MESSAGES, "max_tokens": 3},
    "responses": {"input": "hi", "max_output_tokens": 3},
}
BOUNDS = (
    {"max_tokens": 3, "max_completion_tokens": 5000},
    {"max_tokens": 5000, "max_completion_tokens": 3},
    {"max_tokens": None, "max_completion_tokens": 3},
    {"max_completion_tokens": 3},
    {"max_tokens": 3},
)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("path", ASKED)
async def test_an_answer_costs_no_more_than_was_reserved(
    tmp_path: Path, path: str, bounds: dict[str, Any]
) -> None:
    gateway = make_gateway(
        tmp_path, [spec("echo", "tokens?count=5000", price=PRICE)], policies={"auto": PLAIN_POLICY}
    )
    backend, calls = gateway.scripted("echo"), []
    complete = backend.complete

    async def noted(call: ExpertCall) -> ExpertReply:
        calls.append(call)
        return await complete(call)

    backend.complete = noted
    body = {"model": "auto", **bounds, **ASKED[path], "coe": {"max_cost_usd": 0.000006}}
    async with httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=gateway.app), base_url="http://gateway/v1/"
    ) as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    assert float(answer.headers["x-coe-cost-usd"]) == 0.000006
    (call,) = calls
    said = [call.body.get("max_tokens"), call.body.get("max_completion_tokens")]
    assert {bound for bound in said if bound is not None} == {3}
    if path == "completions":
        assert call.body["max_tokens"] == 3, "the only spelling that completions know"
