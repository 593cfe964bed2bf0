"""Whatever JSON an upstream puts into the fields we read: an answer or an error of that expert."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import msgspec
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from experts.answer_shape import OddAnswer, check_answer, decode_chunk
from experts.protocol import CallTimings, ExpertCall, ExpertReply
from experts.types import Usage
from gateway.anthropic_answer import MessageStream, message_of
from gateway.breakers import BreakerRules
from gateway.choice_logprobs import ChoiceLogprobs
from gateway.relay import ChunkRelay, strip_logprobs, usage_in, usage_of
from gateway.responses_answer import ResponsesStream, response_of
from gateway.state.breakers import BreakerBoard
from tests.contract.gateway_kit import CASCADE_POLICY, PLAIN_POLICY, Gateway, make_gateway, spec

TEXT = st.text("ab{}é\n", max_size=4)
NUMBER = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=3,
)


def field(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Mostly what belongs there: two oddities at once hide behind one another."""
    return st.sampled_from((True,) * 11 + (False,)).flatmap(lambda fits: usual if fits else JSON)


def shape(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({}, optional={k: field(v) for k, v in fields.items()})


def several(one: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(field(one), min_size=1, max_size=2)


INDEX = st.integers(0, 2)
COUNT = st.none() | st.integers(0, 50)
TOP = st.fixed_dictionaries({"token": field(TEXT), "logprob": field(st.floats(-9, 0))})
TOKEN = TOP | st.fixed_dictionaries(
    {"token": TEXT, "logprob": st.floats(-9, 0), "top_logprobs": field(several(TOP))}
)
FUNCTION = shape(name=st.sampled_from(["f", "g"]), arguments=st.sampled_from(['{"x"', ":1}"]))
CALL = shape(index=INDEX, id=TEXT, function=FUNCTION)
DELTA = shape(
    content=TEXT, reasoning_content=TEXT, reasoning=TEXT, refusal=TEXT, tool_calls=several(CALL)
)
LOGPROBS = shape(content=several(TOKEN), token_logprobs=several(st.floats(-9, 0)))
CHOICE = shape(
    index=INDEX,
    delta=DELTA,
    message=DELTA,
    text=TEXT,
    logprobs=LOGPROBS,
    finish_reason=st.sampled_from(["stop", "length", "tool_calls"]),
    stop_reason=TEXT,
)
USAGE = shape(
    prompt_tokens=COUNT,
    completion_tokens=COUNT,
    prompt_tokens_details=shape(cached_tokens=COUNT),
    completion_tokens_details=shape(reasoning_tokens=COUNT),
)
ANSWER = shape(id=TEXT, model=TEXT, created=INDEX, coe=JSON, choices=several(CHOICE), usage=USAGE)
ANSWERS = st.lists(ANSWER.filter(lambda one: isinstance(one, dict)), min_size=1, max_size=4)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(ANSWERS)
def test_what_passes_the_check_breaks_nothing_behind_it(answers: list[dict[str, Any]]) -> None:
    payloads = [msgspec.json.encode(one) for one in answers]
    try:
        chunks = [decode_chunk(payload) for payload in payloads]
    except OddAnswer:
        assume(False)
    for whole in chunks:
        message_of(whole, message_id="m", prompt_tokens=1, thinking=True)
        response_of(whole, {}, tag="t", created_s=1)
        judged = ChoiceLogprobs(choices=0)
        judged.add(whole)
        judged.evidence(finished=True, elapsed_ms=0.0)
        usage_of(whole)
        strip_logprobs(dict(whole))
    usage_in(payloads)
    for hide in (False, True):
        relay = ChunkRelay(expert="x", rename=False, hide_logprobs=hide, include_usage=hide)
        sent = relay.feed(payloads, {"stage": 1})
        sent += relay.finish(relay.usage or Usage(1, 1), {})
        message = MessageStream(
            message_id="m", request_id="r", prompt_tokens=lambda: 1, thinking=hide
        )
        for writer in (message, ResponsesStream({}, tag="t", created_s=1)):
            writer.write(sent)
            writer.end()


class Replaying:
    """A backend that answers with what it was given."""

    def __init__(self) -> None:
        self.answers: list[dict[str, Any]] = []
        self.timings = CallTimings()

    async def complete(self, call: ExpertCall) -> ExpertReply:
        return ExpertReply(msgspec.json.decode(msgspec.json.encode(self.answers[0])))

    @asynccontextmanager
    async def stream(self, call: ExpertCall) -> AsyncIterator[Replaying]:
        yield self

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for one in self.answers:
            yield msgspec.json.encode(one)

    async def aclose(self) -> None:
        return None


@pytest.fixture(scope="module")
def replaying() -> Iterator[tuple[Gateway, Replaying]]:
    backend, patient = Replaying(), BreakerRules(failures_in_a_row=10**9, calls_min=10**9)
    with tempfile.TemporaryDirectory() as folder:
        names = ("echo", "draft", "final")
        gateway = make_gateway(
            Path(folder),
            [spec(name) for name in names],
            policies={"auto": PLAIN_POLICY, "casc": CASCADE_POLICY},
            backends=dict.fromkeys(names, backend),
            breakers=BreakerBoard(rules=patient),
        )
        yield gateway, backend


USER = [{"role": "user", "content": "hi"}]
REQUESTS: dict[str, dict[str, Any]] = {
    "chat/completions": {"messages": USER},
    "completions": {"prompt": "hi"},
    "messages": {"messages": USER, "max_tokens": 8},
    "responses": {"input": "hi"},
}


async def _ask(app: Any, path: str, body: dict[str, Any]) -> httpx2.Response:
    transport = httpx2.ASGITransport(app=app)  # raises what the application does not handle
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
        return await client.post(f"/v1/{path}", json=body)


@settings(
    max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(
    answers=ANSWERS,
    path=st.sampled_from(sorted(REQUESTS)),
    model=st.sampled_from(["auto", "coe/casc"]),
    stream=st.booleans(),
)
def test_every_outcome_is_an_answer_or_an_error_of_the_table(
    replaying: tuple[Gateway, Replaying],
    answers: list[dict[str, Any]],
    path: str,
    model: str,
    stream: bool,
) -> None:
    gateway, backend = replaying
    backend.answers = answers
    body = {"model": model, "stream": stream, **REQUESTS[path]}
    answer = asyncio.run(_ask(gateway.app, path, body))
    journal = gateway.journals.pop()
    assert answer.status_code in (200, 502)
    assert journal.outcome == ("error" if journal.error else "ok")
    if journal.error is None:
        assert answer.status_code == 200
        return
    assert '"expert_failed"' in answer.text
    if not stream:
        with pytest.raises(OddAnswer):
            check_answer(answers[0])
