"""Pains that users of other gateways still have, each with a test of that name.

The threads behind them are numbered in docs/reliability.md.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest

from deployments.store import StateStore
from experts.errors import CoeError, ExpertFailed, UpstreamTimeout
from experts.http_backend import HttpBackend, PoolLimits
from experts.protocol import Backend, ExpertCall, ExpertReply
from experts.scripted import Script, ScriptedBackend
from experts.scripted_server import ScriptedServer
from experts.types import Endpoint
from gateway.access import AccessControl
from gateway.affinity import Session
from gateway.breakers import BreakerRules, expert_target
from gateway.keys import KeyBudgets, KeyLimits, KeyScope, digest_of, key_secret
from gateway.retries import RetryRules
from gateway.service import ServiceLimits
from gateway.state import affinity, breakers
from gateway.state.affinity import SessionMemory
from gateway.state.breakers import BreakerBoard
from gateway.state.keys import KeyLedger, KeyStore
from gateway.wire import parse_request
from tests.contract.conftest import PlainServer
from tests.contract.gateway_kit import (
    FixedRouter,
    Gateway,
    make_gateway,
    openai_client,
    served,
    spec,
)
from tests.contract.test_backend_contract import call

USER: list[Any] = [{"role": "user", "content": "one two"}]
ONCE = RetryRules(per_stage=0)
WITH_SPARE = """
version: 1
default: first
fallbacks: [spare]
caps: {stages: 2, cost_usd: 1.0, deadline_ms: 60000}
"""


class Moody(Backend):
    """Fails with the given errors, one a call, then answers."""

    def __init__(self, *errors: CoeError) -> None:
        self.errors = list(errors)
        self.calls = 0
        self._good = ScriptedBackend(Script.parse("fixed?text=fine"))

    async def complete(self, call: ExpertCall) -> ExpertReply:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return await self._good.complete(call)

    @asynccontextmanager
    async def stream(self, call: ExpertCall) -> AsyncIterator[Any]:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        async with self._good.stream(call) as stream:
            yield stream

    async def aclose(self) -> None:
        return None


async def streamed(client: openai.AsyncOpenAI, model: str) -> tuple[list[str], Any]:
    """The texts and the error of a stream, if it ended with one."""
    seen: list[str] = []
    try:
        stream = await client.chat.completions.create(model=model, messages=USER, stream=True)
        async for chunk in stream:
            seen += [choice.delta.content or "" for choice in chunk.choices]
    except openai.APIError as error:
        return seen, error
    return seen, None


# --- 2 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["fail?status=500", "fail?status=429", "disconnect?after=0"])
async def test_pain_2_until_the_first_token_another_expert_takes_over_unseen(
    tmp_path: Path, first: str
) -> None:
    experts = [spec("first", first), spec("spare", "fixed?text=saved")]
    gateway = make_gateway(tmp_path, experts, policies={"auto": WITH_SPARE}, retries=ONCE)
    async with openai_client("http://gateway", gateway.app) as client:
        seen, error = await streamed(client, "auto")
        whole = await client.chat.completions.create(model="auto", messages=USER)
    assert (error, "".join(seen)) == (None, "saved")
    assert whole.model == "spare"
    assert [s["expert"] for s in gateway.records[0]["stages"]] == ["first", "spare"]


@pytest.mark.parametrize(
    ("first", "code"),
    [("disconnect?after=3", "host_lost"), ("tokens?count=50&pace_ms=5000", "upstream_timeout")],
)
async def test_pain_2_after_the_first_token_a_stable_code_and_never_a_second_voice(
    tmp_path: Path, first: str, code: str
) -> None:
    experts = [spec("first", first), spec("spare", "fixed?text=saved")]

    class Watched(ScriptedBackend):
        """The time limits are the HTTP backend's; a script has to be held to them here."""

        @asynccontextmanager
        async def stream(self, call: ExpertCall) -> AsyncIterator[Any]:
            async with super().stream(call) as stream:
                yield _Idle(stream, call)

    gateway = make_gateway(
        tmp_path,
        experts,
        policies={"auto": WITH_SPARE},
        limits=ServiceLimits(idle_timeout_ms=50),
        backends={"first": Watched(Script.parse(first))},
    )
    async with openai_client("http://gateway", gateway.app) as client:
        seen, error = await streamed(client, "auto")
    assert error.code == code
    assert seen
    assert "saved" not in "".join(seen)
    (stage,) = gateway.records[0]["stages"]
    assert stage["output_tokens"] == len(seen), "what was sent is charged"
    assert gateway.scripted("spare").calls == 0


class _Idle:
    def __init__(self, stream: Any, call: ExpertCall) -> None:
        self._stream, self._call = stream, call
        self.timings = stream.timings

    async def __aiter__(self) -> AsyncIterator[bytes]:
        payloads = aiter(self._stream)
        while True:
            try:
                async with asyncio.timeout(self._call.idle_timeout_ms / 1000):
                    payload = await anext(payloads)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise UpstreamTimeout(self._call.expert, "between tokens", 50) from None
            yield payload


# --- 13 ------------------------------------------------------------------------------------------


@pytest.mark.valkey
async def test_pain_13_a_store_that_hangs_costs_its_small_timeout_once(
    tmp_path: Path, plain_server: PlainServer, namespace: str
) -> None:
    timeout_ms = 1_000.0
    store = StateStore(plain_server.url, timeout_ms=timeout_ms, namespace=namespace)
    gate = AccessControl(
        KeyStore(store), KeyLedger(store), require_keys=True, request_timeout_ms=60_000
    )
    secret = key_secret(b"p" * 32)
    await KeyStore(store).create(
        digest_of(secret), "k", KeyScope(), KeyLimits(), KeyBudgets(total=10**9)
    )
    board, sessions = BreakerBoard(store), SessionMemory(store)
    policy = WITH_SPARE + "on_state_outage: {budgets: open}\n"
    gateway = make_gateway(
        tmp_path,
        [spec("first"), spec("spare")],
        policies={"auto": policy},
        gate=gate,
        breakers=board,
        sessions=sessions,
    )
    board.start()
    sessions.start()
    turns = [*USER, {"role": "assistant", "content": "three"}, *USER]  # affinity asks as well
    async with openai_client("http://gateway", gateway.app, api_key=secret) as client:
        await client.chat.completions.create(model="auto", messages=turns)
        plain_server.send(signal.SIGSTOP)
        took_ms, began = [], time.monotonic()
        for _ in range(15):
            started = time.monotonic()
            await client.chat.completions.create(model="auto", messages=turns)
            took_ms.append((time.monotonic() - started) * 1000)
        elapsed_ms = (time.monotonic() - began) * 1000
        plain_server.send(signal.SIGCONT)
    windows = 1 + elapsed_ms // 500  # the first back-off; a probe may cost the timeout once each
    assert sum(ms >= timeout_ms * 0.9 for ms in took_ms) <= windows
    assert max(took_ms) < 2 * timeout_ms, "one timeout, not one for each use of the store"
    for part in (board, sessions, gate):
        await part.aclose()
    await store.aclose()


# --- 14 ------------------------------------------------------------------------------------------


def moody_gateway(
    tmp_path: Path,
    backend: Backend,
    rules: BreakerRules,
    now_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
) -> Gateway:
    return make_gateway(
        tmp_path,
        [spec("echo"), spec("spare", "fixed?text=saved")],
        policies={"auto": WITH_SPARE.replace("first", "echo")},
        breakers=BreakerBoard(rules=rules, now_ms=now_ms),
        backends={"echo": backend},
        retries=ONCE,
    )


async def test_pain_14_no_client_can_trip_a_breaker(tmp_path: Path) -> None:
    refusals = [ExpertFailed("echo", status, "no") for status in (400, 413, 422, 404, 429) * 6]
    moody = Moody(*refusals)
    gateway = moody_gateway(tmp_path, moody, BreakerRules(failures_in_a_row=3, calls_min=5))
    async with openai_client("http://gateway", gateway.app) as client:
        while moody.errors:
            with pytest.raises(openai.APIStatusError):
                await client.chat.completions.create(model="echo", messages=USER)
        # A deadline of the caller's own that no expert could keep says nothing either.
        moody.errors = [UpstreamTimeout("echo", "total", 1.0)] * 5
        while moody.errors:
            with pytest.raises(openai.APIStatusError):
                await client.chat.completions.create(
                    model="echo", messages=USER, extra_body={"coe": {"deadline_ms": 5000}}
                )
        assert (await client.chat.completions.create(model="echo", messages=USER)).model == "echo"


@pytest.mark.parametrize("stream", [False, True])
async def test_pain_14_nor_can_our_own_crowd(tmp_path: Path, stream: bool) -> None:
    """Whoever waits for one of our connections that others use has not been kept waiting by the
    expert: it goes on with somebody else, or is told to come again.
    """
    upstream = ScriptedServer({"echo": Script.parse("tokens?count=2&pace_ms=600000")})
    async with served(upstream) as url:
        crowded = HttpBackend(f"{url}/v1", limits=PoolLimits(connections_max=1))
        board = BreakerBoard(rules=BreakerRules(failures_in_a_row=1))
        gateway = make_gateway(
            tmp_path,
            [spec("echo"), spec("spare", "fixed?text=saved")],
            policies={"auto": WITH_SPARE.replace("first", "echo")},
            limits=ServiceLimits(request_timeout_ms=400, first_token_timeout_ms=400),
            breakers=board,
            backends={"echo": crowded},
        )
        async with (
            crowded.stream(call(expert="echo", timeout_ms=600_000.0)) as occupying,
            openai_client("http://gateway", gateway.app) as client,
        ):
            await anext(aiter(occupying))
            body: Any = {"messages": USER, "stream": stream}
            await client.chat.completions.create(model="auto", **body)
            with pytest.raises(openai.InternalServerError) as refused:
                await client.chat.completions.create(model="echo", **body)
        await crowded.aclose()
    assert [s["expert"] for s in gateway.records[0]["stages"]] == ["echo", "spare"]
    assert gateway.records[0]["expert"] == "spare"
    assert (refused.value.status_code, refused.value.code) == (503, "connection_pool_full")
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert not board.tripped()
    assert upstream.stats.requests == 1
    assert b'coe_errors_total{code="connection_pool_full"} 1.0' in gateway.metrics.render()


async def test_pain_14_and_22_a_failing_expert_is_left_alone_and_then_probed_once(
    tmp_path: Path,
) -> None:
    moody = Moody(*[ExpertFailed("echo", 500, "oh")] * 4)
    rules, now_ms = BreakerRules(failures_in_a_row=3, open_ms=150), [0.0]
    gateway = moody_gateway(tmp_path, moody, rules, lambda: now_ms[0])
    async with openai_client("http://gateway", gateway.app) as client:
        for _ in range(6):
            answer = await client.chat.completions.create(model="auto", messages=USER)
            assert answer.model == "spare"
        assert moody.calls == 3, "from then on nobody pays for asking it"
        with pytest.raises(openai.InternalServerError) as refused:
            await client.chat.completions.create(model="echo", messages=USER)
        assert refused.value.response.status_code == 503
        assert int(refused.value.response.headers["retry-after"]) >= 1
        route = await client.post(
            "/route", body={"model": "auto", "messages": USER}, cast_to=object
        )
        view = {one["expert"]: one for one in dict(route)["eligible"]}  # type: ignore[call-overload]
        assert not view["echo"]["available"]
        assert "circuit breaker" in view["echo"]["why_not"]
        now_ms[0] += 150
        assert (await client.chat.completions.create(model="auto", messages=USER)).model == "spare"
        assert moody.calls == 4, "the probe failed"
        now_ms[0] += 300
        answers = await asyncio.gather(
            *(client.chat.completions.create(model="auto", messages=USER) for _ in range(8))
        )
        assert "echo" in {answer.model for answer in answers}
        assert (await client.chat.completions.create(model="auto", messages=USER)).model == "echo"


# --- 15 ------------------------------------------------------------------------------------------


async def test_pain_15_what_a_gateway_remembers_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(affinity, "LOCAL_MAX", 50)
    monkeypatch.setattr(breakers, "TARGETS_MAX", 50)
    sessions, board = SessionMemory(), BreakerBoard()
    for number in range(500):
        sessions.remember(f"key {number}", Session("e", "general", 1), 1_000)
        board.note_failure(expert_target(f"e{number}"))
    assert sessions.held == 50
    assert board.held == 50
    gateway = make_gateway(
        tmp_path,
        [spec("first"), spec("spare")],
        policies={"auto": WITH_SPARE},
        sessions=sessions,
        breakers=board,
    )

    async def ask(number: int) -> None:
        body = {
            "model": "auto",
            "messages": [{"role": "user", "content": f"question {number}"}],
            "coe": {"session_id": f"session {number}"},
        }
        with gateway.service.journal("chat/completions", f"r{number}") as journal:
            raw = msgspec.json.encode(body)
            await gateway.service.complete(parse_request(raw, Endpoint.CHAT), journal)

    objects = []
    for number in range(900):
        await asyncio.create_task(ask(number))
        gateway.records.clear()
        gateway.journals.clear()
        if number % 300 == 299:
            gc.collect()
            objects.append(len(gc.get_objects()))
    assert objects[2] - objects[1] < 300, "less than one object per request"


# --- 16 ------------------------------------------------------------------------------------------

# Long enough that the router does not read the turn before it as well.
LONG_TURN = "Now please tell me the sum of all the numbers in this very long column " + "x" * 30
TWO_EXPERTS = """
version: 1
routes: {{sql: first, math: spare}}
default: spare
affinity: {{quality_worth_ms: {worth_ms}}}
caps: {{stages: 1, cost_usd: 1.0, deadline_ms: 60000}}
"""


async def test_pain_16_a_conversation_without_an_id_keeps_its_expert_and_says_why(
    tmp_path: Path,
) -> None:
    policies = {
        "auto": TWO_EXPERTS.format(worth_ms=1),
        "eager": TWO_EXPERTS.format(worth_ms=60_000),
    }
    router = FixedRouter({"select": "sql", "sum": "math"})
    experts = [spec("first"), spec("spare")]
    gateway = make_gateway(tmp_path, experts, policies=policies, router=router)
    start: list[Any] = [{"role": "user", "content": "select all rows"}]
    async with openai_client("http://gateway", gateway.app) as client:

        async def ask(model: str, messages: list[Any], **more: Any) -> tuple[str, dict[str, Any]]:
            answer = await client.chat.completions.create(
                model=model,
                messages=messages,
                extra_body={"coe": {"explain": True}},
                **more,
            )
            extra = answer.model_extra or {}
            return answer.model, extra["coe"]["explain"]["affinity"]

        for model, then in (("auto", "first"), ("coe/eager", "spare")):
            expert, view = await ask(model, start)
            assert (expert, view["outcome"], view["source"]) == ("first", "new", "first_turns")
            later = [
                *start,
                {"role": "assistant", "content": "rows"},
                {"role": "user", "content": LONG_TURN},
            ]
            expert, view = await ask(model, later)
            assert expert == then
            assert view["outcome"] == ("kept" if then == "first" else "switched")
            assert "ms" in view["reason"]
            assert view["expert"] == "first"
        other = [{"role": "user", "content": "what is the sum of the numbers?"}]
        expert, view = await ask("auto", other, extra_headers={"x-session-id": "s1"})
        assert (expert, view["source"]) == ("spare", "header")
        expert, view = await ask("auto", start, extra_headers={"x-session-id": "s1"})
        assert (expert, view["outcome"]) == ("spare", "kept"), "an id needs no earlier turns"
        await client.completions.create(model="auto", prompt="select one")
    text = gateway.metrics.render().decode()
    assert 'coe_affinity_total{outcome="none",source="none"} 1.0' in text, "and they are counted"
