"""Bodies that no client should send: each is refused by name, none is the gateway's failure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.contract.gateway_kit import CASCADE_POLICY, make_gateway, spec

HUGE = 10**400  # a valid JSON number beyond every float
USER = [{"role": "user", "content": "hello"}]
CHAT: dict[str, Any] = {"model": "auto", "messages": USER}
MESSAGE = CHAT | {"max_tokens": 16}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("chat/completions", CHAT | {"temperature": HUGE}, "temperature"),
        ("chat/completions", CHAT | {"coe": {"max_cost_usd": HUGE}}, "coe.max_cost_usd"),
        ("chat/completions", CHAT | {"coe": {"deadline_ms": HUGE}}, "coe.deadline_ms"),
        ("completions", {"model": "auto", "prompt": "hi", "messages": 5}, "messages"),
        ("completions", {"model": "auto", "prompt": "hi", "messages": ["x"]}, "messages"),
        ("embeddings", {"model": "auto", "input": "hi", "messages": [1]}, "messages"),
        ("embeddings", {"model": "auto", "input": "hi", "dimensions": 2**64}, "dimensions"),
        (
            "responses",
            {"model": "auto", "input": "hi", "max_output_tokens": 0},
            "max_output_tokens",
        ),
        ("messages", MESSAGE | {"messages": [{"role": "user", "content": []}]}, "messages"),
        ("messages", MESSAGE | {"messages": [{"role": "system"}]}, "messages"),
        ("messages", MESSAGE | {"system": "s", "messages": [{"role": "system"}]}, "messages"),
        ("messages", MESSAGE | {"stop_sequences": [1]}, "stop_sequences"),
        (
            "messages/count_tokens",
            {"model": "auto", "messages": [{"role": "user", "content": []}]},
            "messages",
        ),
    ],
)
async def test_it_is_refused_by_name(
    tmp_path: Path, path: str, body: dict[str, Any], param: str
) -> None:
    specs = [spec("draft"), spec("final")]  # two, so that the conversation is looked at
    gateway = make_gateway(tmp_path, specs, policies={"auto": CASCADE_POLICY})
    transport = httpx2.ASGITransport(app=gateway.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
        answer = await client.post(f"/v1/{path}", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
