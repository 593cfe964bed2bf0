"""Every kind of refusal, as the official client and the raw wire see it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from experts.types import Capability, SourceKind
from gateway.app import HttpLimits
from gateway.service import ServiceLimits
from tests.contract.gateway_kit import (
    ALL_CAPABILITIES,
    CASCADE_POLICY,
    PLAIN_POLICY,
    Gateway,
    make_gateway,
    openai_client,
    spec,
)

USER: list[Any] = [{"role": "user", "content": "one two three"}]
IMAGE: list[Any] = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}
]


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    capabilities = ALL_CAPABILITIES - {Capability.TOOLS}
    experts = [
        spec("echo", capabilities=capabilities),
        spec("down", "fail?status=503&code=queue_full"),
        spec("broken", "fail?status=500"),
        spec("strict", "fail?status=400&code=bad_thing"),
        spec("draft", "fixed?text=weak&confidence=0.2"),
        spec("final", "fail?status=500"),
        spec("hosted", kind=SourceKind.WEIGHTS, location="/models/none"),
    ]
    return make_gateway(
        tmp_path,
        experts,
        policies={"auto": PLAIN_POLICY, "casc": CASCADE_POLICY},
        limits=ServiceLimits(prompt_chars=50_000),
        http_limits=HttpLimits(body_bytes=200_000),
    )


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client("http://gateway", gateway.app) as client:
        yield client


@pytest.fixture
async def http(gateway: Gateway) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=gateway.app, raise_app_exceptions=False)
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as http:
        yield http


CASES: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"model": "nobody"}, 404, "model_not_found", "model"),
    ({"model": "coe/nobody"}, 404, "model_not_found", "model"),
    ({"model": 7}, 400, "invalid_request", "model"),
    ({"messages": []}, 400, "invalid_request", "messages"),
    ({"messages": "hi"}, 400, "invalid_request", "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, 400, "invalid_request", "messages[0].role"),
    ({"messages": [{"role": "user"}]}, 400, "invalid_request", "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, 400, "invalid_request", "messages[0].content"),
    ({"max_tokens": 0}, 400, "invalid_request", "max_tokens"),
    ({"max_tokens": True}, 400, "invalid_request", "max_tokens"),
    ({"n": "2"}, 400, "invalid_request", "n"),
    ({"stream": "yes"}, 400, "invalid_request", "stream"),
    ({"temperature": "hot"}, 400, "invalid_request", "temperature"),
    (
        {"stream": False, "stream_options": {"include_usage": True}},
        400,
        "invalid_request",
        "stream_options",
    ),
    ({"top_logprobs": 2}, 400, "invalid_request", "top_logprobs"),
    ({"tools": "x"}, 400, "invalid_request", "tools"),
    ({"coe": {"max_cost": 1}}, 400, "invalid_request", "coe.max_cost"),
    ({"coe": {"policy": "nope"}}, 400, "invalid_request", "coe.policy"),
    ({"coe": {"deadline_ms": -1}}, 400, "invalid_request", "coe.deadline_ms"),
    ({"coe": {"deny": ["echo"]}}, 400, "no_eligible_expert", None),
    ({"coe": {"max_cost_usd": 0.0}}, 402, "insufficient_quota", None),
    ({"tools": [{"type": "function"}]}, 400, "no_eligible_expert", None),
    ({"messages": IMAGE}, 400, "no_eligible_expert", None),
    (
        {"messages": [{"role": "user", "content": "word " * 8_000}]},
        400,
        "context_length_exceeded",
        "messages",
    ),
    (
        {"messages": [{"role": "user", "content": "x" * 60_000}]},
        400,
        "invalid_request",
        "messages",
    ),
    ({"messages": [{"role": "user", "content": "x" * 250_000}]}, 413, "body_too_large", None),
    ({"model": "hosted"}, 503, "host_unavailable", None),
    ({"model": "down"}, 503, "queue_full", None),
    ({"model": "broken"}, 502, "expert_failed", None),
    ({"model": "strict"}, 400, "bad_thing", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "status", "code", "param"), CASES)
async def test_refusals_have_status_code_and_param(
    http: httpx2.AsyncClient,
    change: dict[str, Any],
    status: int,
    code: str,
    param: str | None,
    stream: bool,
) -> None:
    body = {"model": "auto", "messages": USER, "stream": stream} | change
    answer = await http.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert answer.headers["x-request-id"]


async def test_the_client_raises_its_own_classes(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="nobody", messages=USER)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert "echo" in missing.value.message
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model="auto", messages=[])
    assert wrong.value.request_id
    with pytest.raises(openai.InternalServerError) as full:
        await client.chat.completions.create(model="down", messages=USER)
    assert full.value.response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"\xff", "JSON"),
        (b'{"a":NaN}', "JSON"),
        (b"[" * 9_000, "JSON"),
    ],
)
async def test_malformed_json(http: httpx2.AsyncClient, raw: bytes, said: str) -> None:
    answer = await http.post("/v1/chat/completions", content=raw)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


async def test_unknown_coe_option_names_the_nearest(http: httpx2.AsyncClient) -> None:
    body = {"model": "auto", "messages": USER, "coe": {"max_cost": 1}}
    answer = await http.post("/v1/chat/completions", json=body)
    assert "'max_cost_usd'" in answer.json()["error"]["message"]


async def test_unknown_path_and_wrong_method(http: httpx2.AsyncClient) -> None:
    missing = await http.post("/v1/nothing", json={})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "path_not_found")
    wrong = await http.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    no_model = await http.get("/v1/models/nobody")
    assert (no_model.status_code, no_model.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_chunked_body_is_bounded_too(http: httpx2.AsyncClient) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(300):
            yield b" " * 1_000

    answer = await http.post("/v1/chat/completions", content=pieces())
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


async def test_a_request_id_is_taken_if_sane(http: httpx2.AsyncClient) -> None:
    body = {"model": "auto", "messages": USER}
    kept = await http.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine-1"})
    assert kept.headers["x-request-id"] == "mine-1"
    odd = await http.post("/v1/chat/completions", json=body, headers={"x-request-id": "a b{}"})
    assert odd.headers["x-request-id"] not in ("", "a b{}")


async def test_an_unhandled_error_is_answered_in_shape(
    gateway: Gateway, http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(_: Any) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(gateway.pool, "candidate", burst)
    answer = await http.post("/v1/chat/completions", json={"model": "auto", "messages": USER})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret detail" not in answer.text
    assert answer.headers["x-request-id"]
    assert gateway.records[-1]["outcome"] == "error"


async def test_requests_beyond_the_bound_are_refused_at_once(tmp_path: Path) -> None:
    full = make_gateway(tmp_path, [spec("echo")], http_limits=HttpLimits(concurrent_requests=0))
    async with openai_client("http://gateway", full.app) as client:
        with pytest.raises(openai.InternalServerError) as refused:
            await client.chat.completions.create(model="auto", messages=USER)
        assert (refused.value.status_code, refused.value.code) == (503, "queue_full")
        assert [m.id async for m in client.models.list()], "GET still answers"


async def test_a_refusal_before_the_first_token_fails_over(tmp_path: Path) -> None:
    experts = [spec("draft", "fail?status=500"), spec("final", "fixed?text=rescued")]
    gateway = make_gateway(tmp_path, experts, policies={"auto": CASCADE_POLICY})
    async with openai_client("http://gateway", gateway.app) as client:
        answer = await client.chat.completions.create(model="auto", messages=USER)
        assert (answer.model, answer.choices[0].message.content) == ("final", "rescued")
        stream = await client.chat.completions.create(model="auto", messages=USER, stream=True)
        assert {c.model async for c in stream} == {"final"}
    assert [s["error"] for s in gateway.records[-1]["stages"]] == ["ExpertFailed", None]


async def test_a_failed_escalation_serves_the_draft_or_tells_not_to_retry(
    client: AsyncOpenAI, gateway: Gateway
) -> None:
    answer = await client.chat.completions.create(model="coe/casc", messages=USER)
    assert answer.model == "draft", "paid for, and better than an error"
    with pytest.raises(openai.InternalServerError) as error:
        await client.copy(max_retries=2).chat.completions.create(
            model="coe/casc", messages=USER, stream=True
        )
    assert error.value.response.headers["x-should-retry"] == "false"
    assert gateway.scripted("final").calls == 4, "two tries per request: the client did not retry"


async def test_probes_and_metrics(http: httpx2.AsyncClient) -> None:
    await http.post("/v1/chat/completions", json={"model": "auto", "messages": USER})
    await http.post("/v1/chat/completions", json={"model": "broken", "messages": USER})
    assert (await http.get("/health/live")).json() == {"status": "ok"}
    assert (await http.get("/health/ready")).json()["status"] == "ready"
    text = (await http.get("/metrics")).text
    assert 'coe_requests_total{endpoint="/v1/chat/completions",status="200"} 1.0' in text
    assert 'coe_errors_total{code="expert_failed"} 1.0' in text
    assert 'coe_tokens_total{direction="output",expert="echo"} 3.0' in text
    assert "coe_in_flight 0.0" in text
