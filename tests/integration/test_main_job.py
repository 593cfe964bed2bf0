"""The main job: one command, real models, the official client, nothing left behind."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import psutil
import pytest

from tests.integration.stack import Stack, launch, quickstart_is_prepared, wait_ready, write_config

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.timeout(600)]

IMPATIENT = {"limits": {"keep_alive_grace_ms": 20, "keep_alive_interval_ms": 20}}
PROMPTS = {
    "general": "Who wrote the play Hamlet?",
    "sql": "Table users(id, name, age). Write a SQL query for the names of users older than 30.",
    "json": "Extract name and age from this text as JSON: Bob is 42 years old.",
    "math": "A crate holds 12 bottles. How many bottles are in 7 crates?",
    "convert": "How many minutes are 3 hours and 20 minutes?",
}


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    assert quickstart_is_prepared(), "run `make models` first"
    folder = tmp_path_factory.mktemp("stack")
    running = launch(write_config(folder, gateway=IMPATIENT), folder)
    try:
        yield wait_ready(running)
    finally:
        if running.process.poll() is None:
            running.stop(signal.SIGKILL)


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=stack.url, api_key="unused", max_retries=0, _strict_response_validation=True
    ) as opened:
        yield opened


def ask(text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "max_tokens": 16, "temperature": 0, **more}


@pytest.mark.parametrize("expert", PROMPTS)
def test_each_kind_of_prompt_reaches_its_expert(client: openai.OpenAI, expert: str) -> None:
    raw = client.chat.completions.with_raw_response.create(model="auto", **ask(PROMPTS[expert]))
    answer = raw.parse()
    assert answer.model == expert
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens > 0
    assert raw.headers["x-coe-expert"] == expert
    assert raw.headers["x-coe-category"] == expert
    assert raw.headers["x-coe-policy"] == "auto"
    assert raw.headers["x-coe-stages"] == "1"
    assert raw.headers["x-request-id"]
    assert raw.headers["x-coe-decision-id"]
    assert float(raw.headers["x-coe-cost-usd"]) > 0
    assert float(raw.headers["x-coe-swap-ms"]) >= 0


@pytest.mark.parametrize("expert", PROMPTS)
def test_every_chunk_of_a_stream_names_the_expert(client: openai.OpenAI, expert: str) -> None:
    chunks = list(
        client.chat.completions.create(
            model="auto",
            stream=True,
            stream_options={"include_usage": True},
            **ask(PROMPTS[expert]),
        )
    )
    assert {chunk.model for chunk in chunks} == {expert}
    assert chunks[-1].usage is not None
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    whole = client.chat.completions.create(model=expert, **ask(PROMPTS[expert]))
    assert text == whole.choices[0].message.content


@pytest.mark.parametrize(
    ("path", "said_meanwhile"),
    [("chat/completions", b": waiting"), ("messages", b"event: ping")],
)
def test_a_stream_is_kept_alive_while_its_expert_is_swapped_in(
    stack: Stack, client: openai.OpenAI, path: str, said_meanwhile: bytes
) -> None:
    """Pain 1: a swap takes several times the 20 ms that a stream may say nothing here."""
    client.chat.completions.create(model="sql", **ask(PROMPTS["sql"]))  # resident from now on
    body = {"model": "math", "stream": True, **ask(PROMPTS["math"])}
    with httpx.stream("POST", f"{stack.url}/{path}", json=body, timeout=60) as answer:
        assert answer.status_code == 200
        raw = answer.read()
    first_word = raw.index(b'"delta"')
    assert raw[:first_word].count(said_meanwhile) >= 2
    assert said_meanwhile not in raw[first_word:]
    assert b'"model":"math"' in raw


def test_completions_answer_too(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="general", prompt="The capital of France is", max_tokens=4, temperature=0
    )
    assert answer.model == "general"
    assert "Paris" in answer.choices[0].text


def test_the_cascade_escalates_and_says_so(client: openai.OpenAI) -> None:
    """The generalist's draft is unsure, so the specialist answers; both stages are reported."""
    raw = client.chat.completions.with_raw_response.create(
        model="coe/cascade", **ask(PROMPTS["math"])
    )
    assert raw.headers["x-coe-stages"] == "2"
    assert raw.headers["x-coe-expert"] == "math"
    assert raw.parse().model == "math"


async def test_mixed_load_swaps_and_loses_nothing(stack: Stack) -> None:
    order = [*PROMPTS, *reversed(PROMPTS), *PROMPTS, *reversed(PROMPTS)]
    async with openai.AsyncOpenAI(base_url=stack.url, api_key="x", max_retries=0) as client:

        async def one(expert: str) -> tuple[str, str | None]:
            answer = await client.chat.completions.create(model="auto", **ask(PROMPTS[expert]))
            return answer.model, answer.choices[0].message.content

        answers = await asyncio.gather(*(one(expert) for expert in order))
    assert [model for model, _ in answers] == order
    texts: dict[str, set[str | None]] = {}
    for model, text in answers:
        texts.setdefault(model, set()).add(text)
    # Greedy answers of one expert agree up to batching, and no expert speaks with another's voice.
    assert not set.intersection(*texts.values())


async def test_a_client_that_leaves_stops_the_generation(stack: Stack) -> None:
    base = stack.url.removesuffix("/v1")
    body = {"model": "general", "stream": True, **ask("Tell me a long story.", max_tokens=1500)}
    async with (
        httpx.AsyncClient(timeout=60) as http,
        http.stream("POST", f"{stack.url}/chat/completions", json=body) as reply,
    ):
        async for line in reply.aiter_lines():
            if '"content":"' in line:
                break
    # A swap must wait for what runs: another expert answering soon proves that nothing does.
    async with asyncio.timeout(20), httpx.AsyncClient(timeout=60) as http:
        reply = await http.post(
            f"{base}/v1/chat/completions", json={"model": "sql", **ask("x", max_tokens=1)}
        )
    assert reply.status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{not json", 400, None),
        (b'{"model": "auto", "messages": []}', 400, "messages"),
        (b'{"model": "auto", "messages": "hello"}', 400, "messages"),
        (b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}', 404, "model"),
        (
            b'{"model": "auto", "messages": [{"role": "user", "content": "'
            + b"word " * 5000
            + b'"}]}',
            400,
            "messages",
        ),
    ],
)
def test_bad_requests_name_the_field(
    stack: Stack, body: bytes, status: int, param: str | None
) -> None:
    reply = httpx.post(
        f"{stack.url}/chat/completions",
        content=body,
        headers={"content-type": "application/json"},
    )
    assert reply.status_code == status
    assert reply.json()["error"]["param"] == param


def test_what_was_planned_for_covers_what_the_template_adds(
    stack: Stack, client: openai.OpenAI
) -> None:
    """The shortest prompt: nearly all of it is the template's, with a system prompt of its own."""
    body: Any = {"model": "general", "messages": [{"role": "user", "content": "x"}]}
    planned = httpx.post(f"{stack.url}/route", json=body | {"max_tokens": 1}).json()
    answer = client.chat.completions.create(**body, max_tokens=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens <= planned["prompt_tokens"]


def test_array_shaped_content_is_routed_by_its_words(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": PROMPTS["sql"]}]
    answer = client.chat.completions.create(
        model="auto",
        messages=[{"role": "user", "content": parts}],  # type: ignore[typeddict-item]
        max_tokens=4,
    )
    assert answer.model == "sql"


def test_the_responses_api_over_the_real_engine(client: openai.OpenAI) -> None:
    body: Any = {"model": "auto", "input": PROMPTS["sql"], "max_output_tokens": 16}
    whole = client.responses.create(**body, temperature=0)
    assert whole.model == "sql"
    assert whole.output_text
    assert whole.usage is not None
    assert whole.usage.input_tokens > 0
    events = list(client.responses.create(**body, temperature=0, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text == whole.output_text
    assert last.response.usage == whole.usage


def test_the_messages_api_over_the_real_engine(stack: Stack) -> None:
    with anthropic.Anthropic(
        base_url=stack.url.removesuffix("/v1"),
        api_key="unused",
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        ask: Any = {
            "model": "auto",
            "max_tokens": 16,
            "extra_body": {"temperature": 0},
            "messages": [{"role": "user", "content": PROMPTS["json"]}],
        }
        whole = client.messages.create(**ask)
        assert whole.model == "json"
        with client.messages.stream(**ask) as stream:
            streamed = stream.get_final_message()
        assert [b.to_dict() for b in streamed.content] == [b.to_dict() for b in whole.content]
        assert streamed.usage.output_tokens == whole.usage.output_tokens
        counted = client.messages.count_tokens(model="json", messages=ask["messages"])
        # The template's own tokens are estimated, the words are counted.
        assert abs(counted.input_tokens - whole.usage.input_tokens) < 48
        stopped = client.messages.create(
            **ask | {"model": "general", "max_tokens": 64}, stop_sequences=["e"]
        )
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "e")


def test_embeddings_of_the_router_s_embedder(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(
        model="coe/embedder", input=["hello", "world"], encoding_format="float"
    )
    assert [len(item.embedding) for item in answer.data] == [384, 384]


def test_a_list_of_models_is_asked_in_order(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="sql", extra_body={"models": ["general"]}, **ask("Hello")
    )
    assert answer.model == "sql"


def test_choices_seed_and_stop_are_the_engine_s(client: openai.OpenAI) -> None:
    body = ask(PROMPTS["general"], temperature=1.0, seed=7, n=3)
    first = client.chat.completions.create(model="general", **body)
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    again = client.chat.completions.create(model="general", **body)
    texts = [[choice.message.content for choice in one.choices] for one in (first, again)]
    assert texts[0] == texts[1]
    greedy = ask(PROMPTS["general"])
    whole = client.chat.completions.create(model="general", **greedy).choices[0].message.content
    assert whole
    stop = whole[len(whole) // 2 :][:3]  # said for sure, and perhaps earlier too
    (cut,) = client.chat.completions.create(model="general", stop=stop, **greedy).choices
    assert (cut.message.content or "") == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    assert (cut.model_extra or {})["stop_reason"] == stop, "the engine's own, passed on"


def test_log_probabilities_are_the_engine_s(client: openai.OpenAI) -> None:
    body = ask(PROMPTS["general"], logprobs=True, top_logprobs=2)
    answer = client.chat.completions.create(model="general", **body)
    (choice,) = answer.choices
    assert choice.logprobs is not None
    assert answer.usage is not None
    tokens = choice.logprobs.content or []
    assert len(tokens) == answer.usage.completion_tokens
    assert b"".join(bytes(t.bytes or ()) for t in tokens).decode() == choice.message.content
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in tokens)
    chunks = list(client.chat.completions.create(model="general", stream=True, **body))
    streamed = [c.choices[0].logprobs for c in chunks if c.choices and c.choices[0].logprobs]
    assert [t.token for one in streamed for t in one.content or ()] == [t.token for t in tokens]


def test_a_schema_binds_the_engine(client: openai.OpenAI) -> None:
    fields = {"city": {"type": "string", "maxLength": 12}, "rooms": {"type": "integer"}}
    schema = {"type": "object", "properties": fields, "required": ["city", "rooms"]}
    answer = client.chat.completions.create(
        model="general",  # which would answer in prose
        messages=[{"role": "user", "content": "Tell me about a hotel in Rome."}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "hotel", "schema": schema | {"additionalProperties": False}},
        },
        max_tokens=100,
        temperature=0,
    )
    said = json.loads(answer.choices[0].message.content or "")
    assert set(said) == {"city", "rooms"}
    assert isinstance(said["rooms"], int)


def test_sigterm_ends_every_process(stack: Stack) -> None:
    """Last in the file: it stops the stack."""
    assert len(stack.processes()) > 5
    assert stack.stop(signal.SIGTERM) == 0
    _, alive = psutil.wait_procs(stack.processes(), timeout=30)
    assert not alive, [p.cmdline() for p in alive]
