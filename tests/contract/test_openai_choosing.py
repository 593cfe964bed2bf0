"""Who may answer: lists of models, hard needs, and what /v1/route says about those left out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from experts.types import Capability
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
GERMAN = "Wie heißt die Hauptstadt von Frankreich, und wie viele Menschen wohnen dort?"
PLAIN = frozenset({Capability.CHAT, Capability.LOGPROBS})
CHOICE_POLICY = """
version: 1
default: [english]
fallbacks: [everyone]
caps: {stages: 1, cost_usd: 1.0, deadline_ms: 60000}
"""
TAGGED_POLICY = CHOICE_POLICY + "required_tags: [eu]\n"
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    experts = [
        spec("echo"),
        spec("english", capabilities=PLAIN, languages=frozenset({"en"})),
        spec("everyone", tags=frozenset({"eu"})),
        spec("small", context_tokens=80),
        spec("broken", "fail?status=500"),
        spec("picky", "fail?status=422"),
        spec("draft", "tokens?count=4&confidence=0.98"),
        spec("final"),
    ]
    policies = {
        "auto": PLAIN_POLICY,
        "choice": CHOICE_POLICY,
        "tagged": TAGGED_POLICY,
        "casc": CASCADE_POLICY,
    }
    return make_gateway(tmp_path, experts, policies=policies)


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[AsyncOpenAI]:
    async with openai_client("http://gateway", gateway.app) as client:
        yield client


async def answering(client: AsyncOpenAI, **body: Any) -> str:
    return (await client.chat.completions.create(**{"messages": USER} | body)).model


async def excluded(client: AsyncOpenAI, **body: Any) -> dict[str, str]:
    view = await client.post("/route", body={"messages": USER} | body, cast_to=dict[str, Any])
    found: dict[str, str] = view["excluded"]
    return found


# --- lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_the_next_of_a_list_answers_when_the_first_fails(
    client: AsyncOpenAI, gateway: Gateway, stream: bool
) -> None:
    body: Any = {"model": "broken", "messages": USER, "extra_body": {"models": ["echo", "final"]}}
    if stream:
        chunks = [c async for c in await client.chat.completions.create(**body, stream=True)]
        assert {chunk.model for chunk in chunks} == {"echo"}
    else:
        assert (await client.chat.completions.create(**body)).model == "echo"
    assert [s["verdict"] for s in gateway.records[-1]["stages"]] == ["failed", "accept"]
    assert gateway.scripted("final").calls == 0


async def test_a_list_leaves_out_who_cannot_and_stops_at_the_caller_s_own_fault(
    client: AsyncOpenAI, gateway: Gateway
) -> None:
    models = ["english", "everyone"]
    assert await answering(client, model="auto", extra_body={"models": models}) == "english"
    both: Any = {"models": models, "coe": {"language": "de"}}
    assert await answering(client, model="coe/choice", extra_body=both) == "everyone"
    with pytest.raises(openai.UnprocessableEntityError):
        await answering(client, model="picky", extra_body={"models": ["echo"]})
    with pytest.raises(openai.NotFoundError) as caught:
        await answering(client, model="echo", extra_body={"models": ["nobody"]})
    assert caught.value.param == "model"


async def test_a_list_keeps_to_the_request_s_money(client: AsyncOpenAI) -> None:
    bound: Any = {"models": ["echo"], "coe": {"max_cost_usd": 0.00025}}
    body: Any = {"model": "broken", "messages": USER, "extra_body": bound}
    view = await client.post("/route", body=body | bound, cast_to=dict[str, Any])
    assert view["plan"]["worst_case_usd"] <= 0.00025


# --- needs ---------------------------------------------------------------------------------------


async def test_parallel_tools_are_a_need_of_their_own(tmp_path: Path) -> None:
    one_by_one = ALL_CAPABILITIES - {Capability.PARALLEL_TOOLS}
    experts = [spec("english", capabilities=one_by_one), spec("everyone")]
    gateway = make_gateway(tmp_path, experts, policies={"auto": CHOICE_POLICY})
    async with openai_client("http://gateway", gateway.app) as client:
        assert await answering(client, model="auto", tools=[TOOL]) == "english"
        both: Any = {"tools": [TOOL], "parallel_tool_calls": True}
        assert await answering(client, model="auto", **both) == "everyone"


async def test_a_language_is_recognised_or_declared(client: AsyncOpenAI) -> None:
    german: Any = [{"role": "user", "content": GERMAN}]
    assert await answering(client, model="coe/choice") == "english"
    assert await answering(client, model="coe/choice", messages=german) == "everyone"
    declared: Any = {"coe": {"language": "en-GB"}}
    assert (
        await answering(client, model="coe/choice", messages=german, extra_body=declared)
        == "english"
    )
    # Recognised is a guess: it never leaves the caller without any answer. Declared is his word.
    assert await answering(client, model="english", messages=german) == "english"
    with pytest.raises(openai.BadRequestError) as caught:
        await answering(client, model="english", extra_body={"coe": {"language": "de"}})
    assert caught.value.code == "no_eligible_expert"
    assert "does not speak 'de'" in caught.value.message


async def test_tags_of_request_and_policy_are_required(client: AsyncOpenAI) -> None:
    assert await answering(client, model="coe/tagged") == "everyone"
    tagged: Any = {"coe": {"tags": ["eu"]}}
    assert await answering(client, model="coe/choice", extra_body=tagged) == "everyone"
    with pytest.raises(openai.BadRequestError) as caught:
        await answering(client, model="echo", extra_body=tagged)
    assert "lacks the tag eu" in caught.value.message


async def test_tools_take_their_share_of_the_context(client: AsyncOpenAI) -> None:
    assert await answering(client, model="small", max_tokens=8) == "small"
    big = {"type": "function", "function": {"name": "f", "description": "long " * 100}}
    with pytest.raises(openai.BadRequestError) as caught:
        await answering(client, model="small", max_tokens=8, tools=[big])
    assert caught.value.code == "context_length_exceeded"


async def test_route_explains_every_exclusion(client: AsyncOpenAI, gateway: Gateway) -> None:
    everybody = {model for model in gateway.service.model_names(_open()) if "/" not in model}
    why = await excluded(
        client, model="coe/choice", tools=[TOOL], coe={"tags": ["eu"], "deny": ["small"]}
    )
    assert set(why) | {"everyone", "auto"} == everybody
    assert why["english"] == "lacks the tag eu, cannot do tools"
    assert why["small"] == "policy 'choice' names it neither for 'general' nor as a fallback"
    named = await excluded(client, model="echo", models=["final"])
    assert named["small"] == "not among the experts that the request names"
    assert not {"echo", "final"} & set(named)


def _open() -> Any:
    from gateway.keys import Access

    return Access()


# --- several choices under a cascade -------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cascade_with_several_choices_serves_them_all(
    client: AsyncOpenAI, gateway: Gateway, stream: bool
) -> None:
    body: Any = {"model": "coe/casc", "messages": USER, "n": 3}
    if stream:
        chunks = [c async for c in await client.chat.completions.create(**body, stream=True)]
        seen = {choice.index for chunk in chunks for choice in chunk.choices}
        assert all(choice.logprobs is None for c in chunks for choice in c.choices)
    else:
        answer = await client.chat.completions.create(**body)
        seen = {choice.index for choice in answer.choices}
        assert all(choice.logprobs is None for choice in answer.choices)
    assert seen == {0, 1, 2}
    assert gateway.records[-1]["expert"] == "draft"
    assert gateway.records[-1]["stages"][0]["mean_logprob"] == pytest.approx(-0.0202, abs=1e-3)
