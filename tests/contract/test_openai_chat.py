"""What the official client sees on success, in process and through a real server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI

from tests.contract.gateway_kit import (
    CASCADE_POLICY,
    PLAIN_POLICY,
    FixedRouter,
    Gateway,
    make_gateway,
    openai_client,
    served,
    spec,
)

USER: list[Any] = [{"role": "user", "content": "one two three"}]
ROUTED_POLICY = PLAIN_POLICY.replace("default: echo", "routes: {maths: tokens}\ndefault: echo")


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    experts = [
        spec("echo"),
        spec("tokens", "tokens?count=5"),
        spec("caller", "tool_call"),
        spec("draft", "fixed?text=a weak draft of five&confidence=0.3"),
        spec("final", "fixed?text=the strong final answer"),
        spec("sure", "fixed?text=sure&confidence=0.99"),
    ]
    policies = {"auto": ROUTED_POLICY, "casc": CASCADE_POLICY}
    return make_gateway(tmp_path, experts, policies=policies, router=FixedRouter({"sum": "maths"}))


@pytest.fixture(params=["in process", "uvicorn"])
async def client(request: Any, gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    if request.param == "in process":
        async with openai_client("http://gateway", gateway.app) as client:
            yield client
        return
    async with served(gateway.app) as url, openai_client(url) as client:
        yield client


async def test_plain_answer_names_the_expert_everywhere(
    client: AsyncOpenAI, gateway: Gateway
) -> None:
    raw = await client.chat.completions.with_raw_response.create(model="auto", messages=USER)
    answer = raw.parse()
    assert answer.choices[0].message.content == "one two three"
    assert answer.model == "echo"
    assert answer.choices[0].logprobs is None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3
    coe = (answer.model_extra or {})["coe"]
    assert (coe["expert"], coe["category"], coe["policy"], coe["stages"]) == (
        "echo",
        "general",
        "auto",
        1,
    )
    assert coe["cost_usd"] == pytest.approx(3 * 1e-6 + 3 * 2e-6)
    assert raw.headers["x-coe-expert"] == "echo"
    assert raw.headers["x-coe-cost-usd"] == "0.000009"
    assert raw.headers["x-coe-decision-id"] == coe["decision_id"]
    assert answer._request_id == raw.headers["x-request-id"]
    record = gateway.records[-1]
    assert (record["outcome"], record["expert"]) == ("ok", "echo")
    assert record["cost_micro_usd"] == 9
    assert "one two three" not in repr(record)


async def test_the_router_s_category_chooses_the_expert(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model="auto",
        messages=[
            {"role": "system", "content": "never route by this sum"},
            {"role": "user", "content": [{"type": "text", "text": "what is the sum"}]},
        ],
    )
    assert answer.model == "tokens"
    assert (answer.model_extra or {})["coe"]["category"] == "maths"


async def test_a_named_expert_answers_itself(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="tokens", messages=USER)
    assert (answer.model, answer.choices[0].message.content) == ("tokens", "t0 t1 t2 t3 t4 ")


async def test_stream_names_the_expert_in_every_chunk(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="auto", messages=USER, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "one two three"
    assert {c.model for c in chunks} == {"echo"}
    assert all(c.usage is None for c in chunks)
    first, last = ((c.model_extra or {})["coe"] for c in (chunks[0], chunks[-1]))
    assert "cost_usd" not in first
    assert last["cost_usd"] == pytest.approx(9e-6)
    assert first["decision_id"] == last["decision_id"]
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert not any("coe" in (c.model_extra or {}) for c in chunks[1:-1])


async def test_stream_with_usage_ends_in_one_usage_chunk(client: AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="auto", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert [c.usage is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 6
    assert (chunks[-1].model_extra or {})["coe"]["cost_usd"] == pytest.approx(9e-6)


async def test_tools_pass_through(client: AsyncOpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    answer = await client.chat.completions.create(model="caller", messages=USER, tools=[tool])
    assert answer.choices[0].finish_reason == "tool_calls"
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].function.name == "weather"  # type: ignore[union-attr]
    history: list[Any] = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [calls[0].model_dump()]},
        {"role": "tool", "tool_call_id": calls[0].id, "content": "sunny"},
    ]
    again = await client.chat.completions.create(model="echo", messages=history, tools=[tool])
    assert again.choices[0].message.content == "one two three"


async def test_n_stop_and_max_tokens_reach_the_expert(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="echo", messages=USER, n=3, stop=["three"])
    assert [c.message.content for c in answer.choices] == ["one two "] * 3
    short = await client.chat.completions.create(model="echo", messages=USER, max_tokens=1)
    assert (short.choices[0].message.content, short.choices[0].finish_reason) == ("one ", "length")


async def test_logprobs_only_when_asked(client: AsyncOpenAI) -> None:
    asked = await client.chat.completions.create(model="coe/casc", messages=USER, logprobs=True)
    assert asked.choices[0].logprobs is not None
    assert len(asked.choices[0].logprobs.content or ()) == 4
    silent = await client.chat.completions.create(model="coe/casc", messages=USER)
    assert silent.choices[0].logprobs is None


async def test_completions_endpoint(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="auto", prompt="x y", logprobs=1)
    assert (answer.choices[0].text, answer.model) == ("x y", "echo")
    assert answer.choices[0].logprobs is not None


async def test_streamed_completions(gateway: Gateway) -> None:
    # OpenAI itself sends a null finish_reason in these chunks, which its own strict client rejects.
    async with openai_client(
        "http://gateway", gateway.app, _strict_response_validation=False
    ) as client:
        stream = await client.completions.create(model="auto", prompt="x y", stream=True)
        chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].text for c in chunks) == "x y"
    assert (chunks[-1].model_extra or {})["coe"]["expert"] == "echo"


async def test_unknown_fields_reach_the_expert(gateway: Gateway, client: AsyncOpenAI) -> None:
    seen: list[Any] = []
    backend = gateway.scripted("echo")
    original = backend.complete

    async def spy(call: Any) -> Any:
        seen.append(dict(call.body))
        return await original(call)

    backend.complete = spy  # type: ignore[method-assign]
    await client.chat.completions.create(
        model="echo",
        messages=USER,
        seed=2**60,
        extra_body={"min_p": 0.05, "coe": {"session_id": "s1"}},
    )
    assert (seen[0]["min_p"], seen[0]["seed"]) == (0.05, 2**60)
    assert "coe" not in seen[0]
    assert gateway.records[-1]["session_id"] == "s1"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_weak_draft_escalates(client: AsyncOpenAI, gateway: Gateway, stream: bool) -> None:
    body: Any = {"model": "coe/casc", "messages": USER}
    if stream:
        chunks = [c async for c in await client.chat.completions.create(**body, stream=True)]
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        model, coe = chunks[0].model, (chunks[-1].model_extra or {})["coe"]
        assert all(c.choices[0].logprobs is None for c in chunks)
    else:
        answer = await client.chat.completions.create(**body)
        text, model = answer.choices[0].message.content or "", answer.model
        coe = (answer.model_extra or {})["coe"]
    assert (text, model, coe["stages"]) == ("the strong final answer", "final", 2)
    verdicts = [(s["expert"], s["verdict"]) for s in gateway.records[-1]["stages"]]
    assert verdicts == [("draft", "escalate"), ("final", "accept")]
    assert coe["cost_usd"] > (3 + 2 * 4) * 1e-6, "the rejected draft is on the bill"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_sure_draft_is_served_whole(tmp_path: Path, gateway: Gateway, stream: bool) -> None:
    experts = [spec("draft", "tokens?count=20&confidence=0.98"), spec("final")]
    folder = tmp_path / "sure"
    folder.mkdir()
    sure = make_gateway(folder, experts, policies={"auto": CASCADE_POLICY})
    async with openai_client("http://gateway", sure.app) as client:
        body: Any = {"model": "auto", "messages": USER}
        if stream:
            chunks = [c async for c in await client.chat.completions.create(**body, stream=True)]
            text = "".join(c.choices[0].delta.content or "" for c in chunks)
            assert all(c.choices[0].logprobs is None for c in chunks)
        else:
            answer = await client.chat.completions.create(**body)
            text = answer.choices[0].message.content or ""
    assert text == "".join(f"t{i} " for i in range(20))
    assert sure.scripted("final").calls == 0
    assert [s["verdict"] for s in sure.records[-1]["stages"]] == ["accept"]


async def test_models_list_and_retrieve(client: AsyncOpenAI) -> None:
    names = [model.id async for model in client.models.list()]
    assert names[:3] == ["auto", "coe/auto", "coe/casc"]
    assert "echo" in names
    assert (await client.models.retrieve("coe/casc")).id == "coe/casc"
    assert ((await client.models.retrieve("echo")).model_extra or {})["coe"]["kind"] == "expert"


async def test_route_explains_without_calling(client: AsyncOpenAI, gateway: Gateway) -> None:
    view = await client.post(
        "/route", body={"model": "coe/casc", "messages": USER}, cast_to=dict[str, Any]
    )
    assert [s["expert"] for s in view["plan"]["stages"]] == ["draft", "final"]
    assert [e["expert"] for e in view["eligible"]] == ["draft", "final"]
    assert view["router"]["posterior"]["general"] == 0.9
    answer = await client.chat.completions.create(
        model="coe/casc", messages=USER, extra_body={"coe": {"explain": True}}
    )
    explained = (answer.model_extra or {})["coe"]["explain"]
    assert explained["plan"] == view["plan"]
    assert gateway.scripted("draft").calls == 1, "only the second request called an expert"
