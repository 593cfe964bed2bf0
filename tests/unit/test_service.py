"""The use case without any server: caps, judging by time, accounting, records on every way out."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from experts.catalogue import Catalogue
from experts.errors import CoeError, DeadlineUnreachable, ExpertFailed, HostLost, PromptTooLong
from experts.protocol import Backend, CallTimings, ExpertCall, ExpertReply
from experts.scripted import Script, render_chunks, render_reply
from experts.types import Capability, Endpoint, ExpertSpec, Price, SourceKind
from gateway.backends import Lease
from gateway.journal import Journal
from gateway.service import Clock, GatewayService, ServiceLimits, build_service
from gateway.wire import WireRequest, parse_request
from policies.calibration import EntropyWeights, OneWeight
from policies.live import PolicySet
from policies.policy_set import Canary
from policies.types import Calibration, Candidate, Caps, PerQuery, Policy, Route, StreamWindow


@dataclass
class Time:
    now_ms: float = 0.0

    def __call__(self) -> float:
        return self.now_ms


@dataclass
class Fake(Backend):
    """Answers like a script; each call and each event moves the clock."""

    script: Script
    clock: Time
    call_ms: float = 0.0
    event_ms: float = 0.0
    error: CoeError | None = None
    calls: list[ExpertCall] = field(default_factory=list)
    open_streams: int = 0
    hang_after: int | None = None

    async def complete(self, call: ExpertCall) -> ExpertReply:
        self._called(call)
        body = render_reply(self.script, call.endpoint, call.body, call.expert)
        return ExpertReply(body, CallTimings("h", 1.0, 2.0))

    @asynccontextmanager
    async def stream(self, call: ExpertCall) -> AsyncIterator[Any]:
        self._called(call)
        self.open_streams += 1
        try:
            yield _FakeStream(self, call)
        finally:
            self.open_streams -= 1

    async def aclose(self) -> None:
        return None

    def _called(self, call: ExpertCall) -> None:
        self.calls.append(call)
        self.clock.now_ms += self.call_ms
        if self.error is not None:
            raise self.error


@dataclass
class _FakeStream:
    backend: Fake
    call: ExpertCall
    timings: CallTimings = field(default_factory=lambda: CallTimings("h"))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        chunks = render_chunks(
            self.backend.script, self.call.endpoint, self.call.body, self.call.expert
        )
        for index, payload in enumerate(chunks):
            if index == self.backend.hang_after:
                await asyncio.Event().wait()
            self.backend.clock.now_ms += self.backend.event_ms
            yield payload


@dataclass
class Experts:
    backends: dict[str, Fake]

    def candidate(self, spec: ExpertSpec) -> Candidate:
        return Candidate(spec)

    def lease(self, spec: ExpertSpec, *, exclude: Iterable[str] = ()) -> Lease:
        return Lease(self.backends[spec.id])

    def suspect(self, host: str) -> None:
        return None


def policy(*route: str, **changes: Any) -> Policy:
    fields: dict[str, Any] = {
        "name": "auto",
        "digest": "d",
        "routes": {},
        "default": Route(route),
        "fallbacks": (),
        "min_confidence": 0.6,
        "calibrations": {"a": Calibration(4.0, 1.0), "b": Calibration(4.0, 1.0)},
        "window": StreamWindow(tokens=4, hold_ms=1_000.0),
        "caps": Caps(stages=3, cost_micro_usd=10**6, deadline_ms=10_000.0),
        "max_output_tokens_default": 50,
    }
    return Policy(**fields | changes)


@dataclass
class World:
    service: GatewayService
    backends: dict[str, Fake]
    clock: Time
    records: list[dict[str, Any]] = field(default_factory=list)


def world(
    chosen: Policy, context_tokens: int = 4_096, trial: Canary | None = None, **scripts: str
) -> World:
    clock = Time()
    backends = {name: Fake(Script.parse(text), clock) for name, text in scripts.items()}
    specs = {name: _spec(name, context_tokens) for name in scripts}
    made = World(None, backends, clock)  # type: ignore[arg-type]
    ids = (f"d{n}" for n in itertools.count(1))
    canaries = {"auto": trial} if trial else {}
    made.service = build_service(
        catalogue=Catalogue(specs),
        policies=lambda: PolicySet({"auto": chosen}, "auto", canaries),
        router=None,
        experts=Experts(backends),
        limits=ServiceLimits(),
        clock=Clock(clock, lambda: 0),
        new_id=lambda: next(ids),
        records=made.records,
    )
    return made


def _spec(name: str, context_tokens: int) -> ExpertSpec:
    return ExpertSpec(
        id=name,
        kind=SourceKind.SCRIPTED,
        location="echo",
        price=Price(1_000_000, 1_000_000),
        context_tokens=context_tokens,
        capabilities=frozenset(Capability),
    )


def request(**changes: Any) -> WireRequest:
    body = {"model": "auto", "messages": [{"role": "user", "content": "one two"}]} | changes
    return parse_request(json.dumps(body).encode(), Endpoint.CHAT)


async def ask(made: World, **changes: Any) -> dict[str, Any]:
    with made.service.journal("chat/completions", "r1") as journal:
        return await made.service.complete(request(**changes), journal)


async def stream(
    made: World, watch: Callable[[Journal], None] = lambda _: None
) -> list[dict[str, Any]]:
    with made.service.journal("chat/completions", "r1") as journal:
        async with made.service.stream(request(stream=True), journal) as answer:
            watch(journal)
            return [msgspec.json.decode(p) async for batch in answer.batches() for p in batch]


WEAK, SURE = "tokens?count=6&confidence=0.2", "tokens?count=6&confidence=0.95"


async def test_the_deadline_stops_the_cascade_and_the_draft_is_served() -> None:
    made = world(policy("a", "b"), a=WEAK, b=SURE)
    made.backends["a"].call_ms = 10_001.0
    body = await ask(made)
    assert body["model"] == "a"
    assert made.backends["b"].calls == []


async def test_a_streamed_draft_is_not_aborted_when_nothing_can_follow() -> None:
    made = world(policy("a", "b"), a=WEAK, b=SURE)
    made.backends["a"].event_ms = 11_000.0  # the window closes after the deadline
    chunks = await stream(made)
    assert {chunk["model"] for chunk in chunks} == {"a"}
    text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
    assert text == "t0 t1 t2 t3 t4 t5 "


@pytest.mark.parametrize("tokens", [2, 6])
async def test_a_draft_that_was_read_to_its_end_costs_what_the_expert_counted(tokens: int) -> None:
    draft = f"tokens?count={tokens}&confidence=0.2"
    chosen = policy("a", "b", window=StreamWindow(tokens=100, hold_ms=1_000.0))
    made = world(chosen, a=draft, b=SURE)
    await stream(made)
    # Two prompt words: an estimate of the prompt would be ten times that.
    assert [s["cost_micro_usd"] for s in made.records[0]["stages"]] == [2 + tokens, 8]


async def test_a_doubtful_draft_that_is_served_costs_what_the_expert_counted() -> None:
    made = world(policy("a", "b"), a=WEAK, b=SURE)
    made.backends["a"].event_ms = 11_000.0
    await stream(made)
    (record,) = made.records
    assert (record["cost_micro_usd"], record["output_tokens"]) == (8, 6)


async def test_a_stream_that_is_no_json_is_the_expert_s_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = world(policy("a", "b"), a=WEAK, b=SURE)
    open_stream = Fake.stream

    def garbled(self: Fake, call: ExpertCall) -> Any:
        if call.expert == "a":
            monkeypatch.setattr(_FakeStream, "__aiter__", _garbage)
        else:
            monkeypatch.undo()
        return open_stream(self, call)

    monkeypatch.setattr(Fake, "stream", garbled)
    chunks = await stream(made)
    assert {chunk["model"] for chunk in chunks} == {"b"}
    assert made.records[0]["stages"][0]["error"] == "ExpertFailed"


async def _garbage(_: _FakeStream) -> AsyncIterator[bytes]:
    yield b'{"choices": ['


async def test_a_silent_draft_is_judged_when_the_window_s_time_is_over() -> None:
    window = StreamWindow(tokens=100, hold_ms=20.0)
    made = world(policy("a", "b", window=window), a=WEAK, b=SURE)
    made.backends["a"].hang_after = 2
    real_loop = asyncio.get_running_loop()
    made.service._clock = Clock(lambda: real_loop.time() * 1000, lambda: 0)
    chunks = await stream(made)
    assert {chunk["model"] for chunk in chunks} == {"b"}
    assert made.backends["a"].open_streams == 0, "the draft was closed"


async def test_stage_calls_carry_the_plan_s_bounds() -> None:
    made = world(policy("a", "b"), a=WEAK, b=SURE)
    made.backends["a"].call_ms = 4_000.0
    await ask(made)
    first, second = made.backends["a"].calls[0], made.backends["b"].calls[0]
    assert (first.timeout_ms, second.timeout_ms) == (10_000.0, 6_000.0)
    assert (first.body["max_tokens"], first.body["logprobs"]) == (50, True)
    assert "logprobs" not in second.body, "nothing judges the last stage"
    assert second.request_id == "r1"
    assert (first.likely_next, second.likely_next) == ("b", None)


async def test_the_caller_s_own_bounds_are_kept() -> None:
    made = world(policy("a"), a=SURE)
    await ask(made, max_tokens=3, coe={"deadline_ms": 500})
    call = made.backends["a"].calls[0]
    assert (call.body["max_tokens"], call.timeout_ms) == (3, 500.0)


async def test_every_stage_is_on_the_bill() -> None:
    made = world(policy("a", "b"), a=WEAK, b=SURE)
    body = await ask(made)
    # Two prompt words and six tokens each, at a micro-dollar a token.
    assert body["coe"]["cost_usd"] == pytest.approx(16e-6)
    assert body["coe"]["usage"] == {"prompt_tokens": 4, "completion_tokens": 12}
    assert body["usage"]["completion_tokens"] == 6, "usage is that of the served answer"
    (record,) = made.records
    assert record["cost_micro_usd"] == 16
    assert [s["cost_micro_usd"] for s in record["stages"]] == [8, 8]


async def test_an_error_of_the_request_does_not_move_on() -> None:
    made = world(policy("a", "b"), a=WEAK, b=SURE)
    made.backends["a"].error = ExpertFailed("a", 400, "bad schema", "response_format")
    with pytest.raises(ExpertFailed):
        await ask(made)
    assert made.backends["b"].calls == []
    assert (made.records[0]["outcome"], made.records[0]["error"]) == ("error", "ExpertFailed")


async def test_the_last_failure_is_told_when_all_stages_failed() -> None:
    made = world(policy("a", "b"), a=WEAK, b=SURE)
    made.backends["a"].error = HostLost("a", "h")
    made.backends["b"].error = ExpertFailed("b", 500, "boom")
    with pytest.raises(ExpertFailed):
        await ask(made)
    assert [s["error"] for s in made.records[0]["stages"]] == ["HostLost", "ExpertFailed"]


async def test_a_deadline_that_passed_while_deciding_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = world(policy("a"), a=SURE)
    candidate = Experts.candidate

    def slowly(self: Experts, spec: ExpertSpec) -> Candidate:
        made.clock.now_ms += 20_000.0
        return candidate(self, spec)

    monkeypatch.setattr(Experts, "candidate", slowly)
    with pytest.raises(DeadlineUnreachable):
        await ask(made)
    assert made.backends["a"].calls == []


async def test_leaving_a_stream_closes_it_and_is_recorded() -> None:
    made = world(policy("a"), a=SURE)
    made.backends["a"].hang_after = 3
    started = asyncio.Event()
    task = asyncio.create_task(stream(made, lambda _: started.set()))
    await started.wait()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert made.backends["a"].open_streams == 0
    (record,) = made.records
    assert record["outcome"] == "client_closed"
    assert record["stages"][0]["verdict"] == "aborted"
    assert record["cost_micro_usd"] > 0, "the prompt and the tokens made are charged"


async def test_the_context_bound_names_the_longest_context() -> None:
    made = world(policy("a"), context_tokens=60, a=SURE)
    with pytest.raises(PromptTooLong) as error:
        await ask(made, messages=[{"role": "user", "content": "word " * 100}])
    assert error.value.limit_tokens == 60
    assert made.backends["a"].calls == []


def per_query_policy(price_of_money: float = 0.0) -> Policy:
    """``a`` is the weaker expert whose answer shows how good it is; ``b`` is worth 0.65."""
    table = {"general": {"a": 0.6, "b": 0.65}}
    rule = PerQuery(price_of_money, 0.0, 50, table, confidence_sd={"a": 0.3})
    return policy("b", per_query=rule)


@pytest.mark.parametrize(("draft", "served"), [(WEAK, "b"), (SURE, "a")])
async def test_a_per_query_plan_escalates_by_the_next_expert_s_value(
    draft: str, served: str
) -> None:
    made = world(per_query_policy(), a=draft, b=SURE)
    assert (await ask(made))["model"] == served
    chunks = await stream(world(per_query_policy(), a=draft, b=SURE))
    assert {chunk["model"] for chunk in chunks} == {served}


def three_stages(weight: float, **of_b: Any) -> Policy:
    """``b`` is judged by whether it says what ``a`` said; ``c`` answers for both."""
    agrees = Calibration(0.001, -1.0, agreement=OneWeight(weight, missing=0.0), **of_b)
    return policy("a", "b", "c", calibrations={"a": Calibration(4.0, 1.0), "b": agrees})


@pytest.mark.parametrize(("said", "served"), [("Paris.", "b"), ("Rome.", "c")])
async def test_a_second_draft_that_agrees_with_the_first_is_believed(
    said: str, served: str
) -> None:
    scripts = {"a": "fixed?text=Paris&confidence=0.2", "b": f"fixed?text={said}", "c": SURE}
    made = world(three_stages(4.0), **scripts)
    assert (await ask(made))["model"] == served
    first, second, *_ = made.records[-1]["stages"]
    assert first["agreement"] is None
    assert second["agreement"] == (1.0 if served == "b" else 0.0)
    assert second["confidence"] == pytest.approx(
        1 / (1 + math.exp(1 - 4.0 * (served == "b"))), 0.01
    )
    streamed = await stream(world(three_stages(4.0), **scripts))
    assert streamed[-1]["model"] == served


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
async def test_alternatives_are_asked_for_where_entropy_is_read_and_stay_hidden(
    endpoint: Endpoint,
) -> None:
    doubts = Calibration(0.001, 1.0, entropy=EntropyWeights(mean=-2.0, missing=5.0))
    chosen = policy("a", "b", calibrations={"a": doubts})
    made = world(chosen, a="tokens?confidence=0.3", b=SURE)
    asked = {"model": "auto", "prompt": "one", "messages": [{"role": "user", "content": "one"}]}
    del asked["messages" if endpoint is Endpoint.COMPLETIONS else "prompt"]
    body = parse_request(json.dumps(asked).encode(), endpoint)
    with made.service.journal("completions", "r1") as journal:
        answer = await made.service.complete(body, journal)
    assert answer["model"] == "b", "0.3 and four others of 0.175: an entropy of 1.58 nats"
    sent = made.backends["a"].calls[0].body
    assert sent.get("top_logprobs") == (5 if endpoint is Endpoint.CHAT else None)
    assert sent["logprobs"] == (True if endpoint is Endpoint.CHAT else 5)
    assert "logprobs" not in made.backends["b"].calls[0].body, "the last stage is not judged"
    assert made.records[-1]["stages"][0]["confidence"] == pytest.approx(0.103, abs=0.002)


async def test_a_caller_s_own_log_probabilities_are_left_as_asked() -> None:
    doubts = Calibration(0.001, -1.0, entropy=EntropyWeights(mean=-2.0, missing=5.0))
    made = world(policy("a", "b", calibrations={"a": doubts}), a=WEAK, b=SURE)
    body = await ask(made, logprobs=True, top_logprobs=2)
    assert body["model"] == "a", "two alternatives make no entropy, so `missing` stands for it"
    assert len(body["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 2


async def test_a_later_bound_moves_with_what_the_first_answer_said() -> None:
    """a's doubt lowers b and c together, so b, no better than before, is good enough now."""
    table = {"general": {"a": 0.5, "b": 0.6, "c": 0.7}}
    sd, moves = {"a": 0.3, "b": 0.15}, {"a": {"c": 0.14}}
    plain = Calibration(4.0, 1.0)
    served = {}
    for name, known in (("independent", {}), ("correlated", moves)):
        rule = PerQuery(0.0, 0.0, 50, table, confidence_sd=sd, confidence_moves=known)
        chosen = policy("a", per_query=rule, calibrations={"a": plain, "b": plain})
        made = world(chosen, a=WEAK, b="tokens?confidence=0.85", c=SURE)
        served[name] = (await ask(made))["model"]
        with made.service.journal("route", "r1") as journal:
            stages = (await made.service.explain(request(), journal))["plan"]["stages"]
        assert [stage["expert"] for stage in stages] == ["a", "b", "c"]
        assert ("min_confidence_follows" in stages[1]) == (name == "correlated")
    assert served == {"independent": "c", "correlated": "b"}


async def test_per_query_terms_are_explained_without_a_call() -> None:
    made = world(per_query_policy(100.0), a=WEAK, b=SURE)
    with made.service.journal("route", "r1") as journal:
        view = await made.service.explain(request(), journal)
    by_expert = {terms["expert"]: terms for terms in view["terms"]}
    assert set(by_expert) == {"a", "b"}
    b = by_expert["b"]
    assert b["money_term"] == pytest.approx(100.0 * b["expected_cost_usd"], abs=1e-4)
    expected = b["quality"] - b["money_term"] - b["latency_term"]
    assert b["value"] == pytest.approx(expected, abs=1e-3)
    assert b["quality_from"] == "policy"
    assert made.backends["a"].calls == []


async def test_embeddings_are_neither_judged_nor_explored() -> None:
    made = world(policy("a", "b", explore_share=1.0), a="echo", b="echo")
    for _ in range(8):
        asked = parse_request(b'{"model":"auto","input":"one two"}', Endpoint.EMBEDDINGS)
        with made.service.journal("embeddings", "r1") as journal:
            await made.service.complete(asked, journal)
    assert len(made.backends["a"].calls) == 8
    assert "logprobs" not in made.backends["a"].calls[0].body
    assert made.backends["b"].calls == []


async def test_each_prompt_of_a_list_has_the_whole_context_to_itself() -> None:
    made = world(policy("a"), context_tokens=100, a="echo")
    body = {"model": "auto", "prompt": ["word " * 6] * 10, "max_tokens": 5}
    asked = parse_request(json.dumps(body).encode(), Endpoint.COMPLETIONS)
    with made.service.journal("completions", "r1") as journal:
        await made.service.complete(asked, journal)
    assert journal.decision is not None
    assert journal.decision.prompt_tokens > 100, "all of them are paid for"


async def test_a_conversation_without_an_id_keeps_its_version_of_a_policy_on_trial() -> None:
    trial = Canary(policy("b", digest="trial"), 0.5)
    made = world(policy("a"), trial=trial, a=SURE, b=SURE)
    versions = []
    for number in range(40):
        turns: list[dict[str, str]] = []
        served = set()
        for _ in range(3):
            turns.append({"role": "user", "content": f"question {number}.{len(turns)}"})
            served.add((await ask(made, messages=turns))["model"])
            turns.append({"role": "assistant", "content": "an answer"})
        versions.append(served)
    assert {frozenset(served) for served in versions} == {frozenset("a"), frozenset("b")}
