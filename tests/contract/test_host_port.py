"""The host's own port over real sockets: HttpBackend on one side, a slot and its engine behind."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

import httpx2
import pytest

from deployments.host_http import HostPort
from deployments.swap.config import SchedulerConfig
from deployments.swap.driver import SlotDriver, SwapReport
from experts.errors import (
    CoeError,
    ExpertFailed,
    HostLost,
    HostUnavailable,
    InvalidRequest,
)
from experts.http_backend import HttpBackend
from experts.protocol import ExpertCall
from experts.types import Endpoint
from tests.contract.gateway_kit import eventually, served

TOKEN = "host-secret"
BODY_BYTES_MAX = 10_000
QUICK = SchedulerConfig(
    age_bound_ms=20, min_residency_ms=0, drain_deadline_ms=40, swap_timeout_ms=2_000
)
PATIENT = SchedulerConfig(age_bound_ms=60_000, min_residency_ms=0, drain_deadline_ms=60_000)


def sse(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def token(text: str, finish: str | None = None) -> str:
    return sse({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})


class ScriptedEngine:
    """An engine with one slot that does what ``body["script"]`` says, step by step.

    ``wait`` stops until ``go`` is set; ``die`` raises HostLost; ``400`` and ``500`` are error
    events as vLLM writes them; anything else is a token. A whole answer is made of its tokens.
    """

    def __init__(self) -> None:
        self.resident: str | None = None
        self.running: list[str] = []
        self.calls: list[str] = []
        self.swaps: list[str] = []
        self.aborted: list[str] = []
        self.go = asyncio.Event()
        self.dead = False
        self.swallows_cancellation = False

    # --- as the slot's actuator

    async def make_resident(self, expert: str) -> SwapReport:
        assert self.running == [], "a swap under a running generation"
        self.swaps.append(expert)
        await asyncio.sleep(0.002)
        self.resident = expert
        return SwapReport(expert, 2.0, 0.0, 1)

    async def check_health(self) -> None:
        if self.dead:
            raise HostLost("", "")

    # --- as the port's engine

    async def serve(
        self, expert: str, endpoint: Endpoint, body: Mapping[str, Any], *, request_id: str
    ) -> dict[str, Any] | AsyncIterator[str]:
        assert self.resident == expert, "generating with another expert's weights"
        self.calls.append(expert)
        if body.get("script") == "invalid":
            raise InvalidRequest("temperature", "must not be negative")
        events = self._events(expert, tuple(body.get("script", ("hello",))))
        if body.get("stream"):
            return events
        return await self._whole(events)

    async def _events(self, expert: str, script: tuple[str, ...]) -> AsyncGenerator[str, None]:
        self.running.append(expert)
        try:
            for step in script:
                if step == "wait":
                    await self.go.wait()
                elif step == "die":
                    raise HostLost(expert, "")
                elif step in ("400", "500"):
                    yield sse({"error": {"message": "so sorry", "param": "n", "code": int(step)}})
                else:
                    yield token(step)
            yield token("", "stop")
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(expert)
            raise
        finally:
            self.running.remove(expert)

    async def _whole(self, events: AsyncGenerator[str, None]) -> dict[str, Any]:
        try:
            told = [json.loads(event[6:]) async for event in events if "[DONE]" not in event]
        except asyncio.CancelledError:
            if self.swallows_cancellation:  # as vLLM's serving layer does
                raise InvalidRequest(None, "Client disconnected") from None
            raise
        text = "".join(part["choices"][0]["delta"]["content"] for part in told)
        return {"choices": [{"message": {"role": "assistant", "content": text}}]}


class Slot:
    """A started driver, its engine, and the port over both."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.engine = ScriptedEngine()
        self.driver = SlotDriver(
            config, ("a", "b"), self.engine, clock=lambda: time.monotonic() * 1000
        )
        port = HostPort(
            host_id="host-1",
            engine=self.engine,
            driver=self.driver,
            experts=("a", "b"),
            token=TOKEN,
            body_bytes_max=BODY_BYTES_MAX,
        )
        self.app = port.app(health=self.engine.check_health)
        self.url = ""
        self.backend = HttpBackend("http://unset")

    def at_rest(self) -> bool:
        shown = self.driver.snapshot()
        return not self.engine.running and not shown.in_flight and not shown.queued

    async def can_still_turn(self) -> None:
        """The proof that no lease is left: both experts can be made resident and answer."""
        await eventually(self.at_rest)
        for expert in ("a", "b", "a"):
            assert text_of(await self.backend.complete(call(expert))) == "hello"


@pytest.fixture(params=[PATIENT], ids=["patient"])
async def slot(request: Any) -> AsyncIterator[Slot]:
    slot = Slot(request.param)
    await slot.driver.start()
    async with served(slot.app) as url:
        slot.url = url
        slot.backend = HttpBackend(f"{url}/v1", secret=lambda: TOKEN, host="host-1")
        yield slot
        slot.engine.go.set()
        await slot.backend.aclose()
        await slot.driver.aclose()


quick = pytest.mark.parametrize("slot", [QUICK], indirect=True, ids=["quick"])


def call(expert: str = "a", *script: str, **changes: Any) -> ExpertCall:
    body = {"messages": [{"role": "user", "content": "hi"}], "script": script or ("hello",)}
    fields: dict[str, Any] = {
        "expert": expert,
        "endpoint": Endpoint.CHAT,
        "body": body,
        "request_id": "r1",
        "timeout_ms": 5_000.0,
        "first_token_timeout_ms": 5_000.0,
        "idle_timeout_ms": 5_000.0,
    }
    return ExpertCall(**fields | changes)


def text_of(reply: Any) -> str:
    text: str = reply.body["choices"][0]["message"]["content"]
    return text


async def streamed(slot: Slot, asked: ExpertCall) -> str:
    async with slot.backend.stream(asked) as stream:
        parts = [json.loads(payload) async for payload in stream]
    return "".join(part["choices"][0]["delta"]["content"] for part in parts)


async def post(slot: Slot, content: bytes | str, **headers: str) -> httpx2.Response:
    sent = {k: v.encode() for k, v in ({"authorization": f"Bearer {TOKEN}"} | headers).items()}
    async with httpx2.AsyncClient(base_url=slot.url) as client:
        return await client.post("/v1/chat/completions", content=content, headers=sent)


# --- who may ask what -----------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer wrong", "Bearer höst", TOKEN + "x"])
async def test_without_the_shared_token_nothing_is_served(slot: Slot, sent: str) -> None:
    reply = await post(slot, '{"model": "a"}', authorization=sent)
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_host_token")
    assert slot.engine.calls == []
    assert TOKEN not in reply.text


async def test_a_body_above_the_limit_is_refused_although_the_client_sends_it_all(
    slot: Slot,
) -> None:
    reply = await post(slot, b'{"model": "a", "x": "' + b"x" * 40 * BODY_BYTES_MAX + b'"}')
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"a"', b"null", b'{"model": NaN}', b'{"x": "\xff"}', b"[" * 9_000],
    ids=["empty", "cut", "list", "string", "null", "nan", "latin1", "deep"],
)
async def test_what_is_not_a_json_object_is_the_callers_mistake(slot: Slot, body: bytes) -> None:
    reply = await post(slot, body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_request")


@pytest.mark.parametrize("model", ["c", None, 7, ["a"], {"a": 1}, ""])
async def test_an_expert_that_is_not_here_is_404_and_names_those_that_are(
    slot: Slot, model: Any
) -> None:
    reply = await post(slot, json.dumps({"model": model}))
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert "a, b" in reply.json()["error"]["message"]
    assert reply.headers["x-coe-host"] == "host-1"


@pytest.mark.parametrize("header", ["x-coe-priority", "x-coe-queue-deadline-ms"])
@pytest.mark.parametrize("value", ["high", "nan", "-inf", "1e999", "", "0x10", "1 2"])
async def test_a_header_that_is_no_number_is_400_by_name(
    slot: Slot, header: str, value: str
) -> None:
    reply = await post(slot, '{"model": "a"}', **{header: value})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, header)
    await slot.can_still_turn()


async def test_a_priority_beyond_all_bounds_is_served(slot: Slot) -> None:
    reply = await post(slot, '{"model": "a"}', **{"x-coe-priority": "-1e300"})
    assert reply.status_code == 200


# --- answers --------------------------------------------------------------------------------------


async def test_whole_answers_and_streams_tell_what_they_waited_for(slot: Slot) -> None:
    reply = await slot.backend.complete(call("a"))
    assert text_of(reply) == "hello"
    assert reply.timings.host == "host-1"
    assert reply.timings.swap_ms > 0, "the first request of all has to wait for a swap"
    async with slot.backend.stream(call("a", "one ", "two")) as stream:
        assert stream.timings.swap_ms == 0
        assert [p async for p in stream][-1].endswith(b'"finish_reason": "stop"}]}')
    assert await streamed(slot, call("b", "one ", "two")) == "one two"
    await slot.can_still_turn()


async def test_health_needs_no_token_and_tells_when_the_engine_is_dead(slot: Slot) -> None:
    async with httpx2.AsyncClient(base_url=slot.url) as client:
        assert (await client.get("/health")).json() == {"status": "ok", "host": "host-1"}
        slot.engine.dead = True
        assert (await client.get("/health")).status_code == 503


# --- clients that leave ---------------------------------------------------------------------------


async def test_a_client_that_leaves_the_queue_takes_its_place_along(slot: Slot) -> None:
    busy = asyncio.create_task(slot.backend.complete(call("a", "wait", "x")))
    await eventually(lambda: slot.engine.running == ["a"])
    waiter = asyncio.create_task(slot.backend.complete(call("b")))
    await eventually(lambda: dict(slot.driver.snapshot().queued) == {"b": 1})
    waiter.cancel()
    await eventually(lambda: not slot.driver.snapshot().queued)
    slot.engine.go.set()
    assert text_of(await busy) == "x"
    assert slot.engine.swaps == ["a"], "a swap for somebody who had left"
    await slot.can_still_turn()


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("swallows", [True, False])
async def test_a_client_that_leaves_before_the_first_event_ends_the_generation(
    slot: Slot, streams: bool, swallows: bool
) -> None:
    slot.engine.swallows_cancellation = swallows
    asked = call("a", "wait", "x")
    client: asyncio.Task[Any] = asyncio.create_task(
        streamed(slot, asked) if streams else slot.backend.complete(asked)
    )
    await eventually(lambda: slot.engine.running == ["a"])
    client.cancel()
    await eventually(lambda: slot.engine.aborted == ["a"])
    await slot.can_still_turn()


async def test_a_client_that_leaves_in_mid_stream_ends_the_generation(slot: Slot) -> None:
    async with slot.backend.stream(call("a", "one", "wait", "two")) as stream:
        async for _ in stream:
            break
        assert slot.engine.running == ["a"]
    await eventually(lambda: slot.engine.aborted == ["a"])
    await slot.can_still_turn()


async def test_a_client_that_leaves_between_answer_and_first_byte_leaves_no_lease() -> None:
    """The stream is handed over, but the server is cancelled before it sends anything."""
    slot = Slot(PATIENT)
    await slot.driver.start()
    body = json.dumps({"model": "a", "stream": True, "script": ["one", "wait"]}).encode()
    arrived = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if not arrived.is_set():
            arrived.set()
            return {"type": "http.request", "body": body}
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: Any) -> None:
        task.cancel()
        await asyncio.sleep(0)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "headers": [(b"authorization", f"Bearer {TOKEN}".encode())],
        "query_string": b"",
    }
    task = asyncio.ensure_future(slot.app(scope, receive, send))
    await asyncio.wait({task})
    assert task.cancelled()
    await eventually(slot.at_rest)
    assert slot.engine.aborted == ["a"]
    await slot.driver.aclose()


# --- drains ---------------------------------------------------------------------------------------


@quick
@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("swallows", [True, False])
async def test_a_drain_takes_back_what_has_sent_nothing_and_answers_it_later(
    slot: Slot, streams: bool, swallows: bool
) -> None:
    slot.engine.swallows_cancellation = swallows
    asked = call("a", "wait", "late")
    slow = asyncio.create_task(
        streamed(slot, asked) if streams else _text(slot.backend.complete(asked))
    )
    await eventually(lambda: slot.engine.running == ["a"])
    assert text_of(await slot.backend.complete(call("b"))) == "hello"
    assert slot.engine.aborted == ["a"], "the drain's deadline took the place back"
    await eventually(lambda: slot.engine.running == ["a"])
    slot.engine.go.set()
    assert await slow == "late"
    assert slot.engine.calls == ["a", "b", "a"]
    await slot.can_still_turn()


@quick
async def test_what_was_taken_back_once_is_not_taken_back_again(slot: Slot) -> None:
    slow = asyncio.create_task(_text(slot.backend.complete(call("a", "wait", "late"))))
    await eventually(lambda: slot.engine.running == ["a"])
    await slot.backend.complete(call("b"))
    await eventually(lambda: slot.engine.running == ["a"])
    second = asyncio.create_task(slot.backend.complete(call("b")))
    await asyncio.sleep(4 * (QUICK.age_bound_ms + QUICK.drain_deadline_ms) / 1000)
    assert slot.engine.aborted == ["a"], "aborted a second time"
    assert not second.done()
    slot.engine.go.set()
    assert await slow == "late"
    assert text_of(await second) == "hello"


@quick
async def test_a_stream_that_has_begun_is_not_cut_by_a_drain(slot: Slot) -> None:
    async with slot.backend.stream(call("a", "one", "wait", "two")) as stream:
        events = aiter(stream)
        await anext(events)
        other = asyncio.create_task(slot.backend.complete(call("b")))
        await asyncio.sleep(4 * (QUICK.age_bound_ms + QUICK.drain_deadline_ms) / 1000)
        slot.engine.go.set()
        assert len([event async for event in events]) == 2
    assert text_of(await other) == "hello"
    assert slot.engine.aborted == []


async def test_a_host_that_closes_sends_its_callers_elsewhere(slot: Slot) -> None:
    running = asyncio.create_task(slot.backend.complete(call("a", "wait", "x")))
    await eventually(lambda: slot.engine.running == ["a"])
    queued = asyncio.create_task(slot.backend.complete(call("b")))
    await eventually(lambda: dict(slot.driver.snapshot().queued) == {"b": 1})
    await slot.driver.aclose()
    for client in (running, queued):
        with pytest.raises(HostUnavailable):
            await client
    await eventually(lambda: slot.engine.running == [])


async def _text(reply: Any) -> str:
    return text_of(await reply)


# --- engines that fail ----------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize(
    ("script", "error", "status"),
    [
        ("invalid", ExpertFailed, 400),
        (["400"], ExpertFailed, 400),
        (["500"], ExpertFailed, 502),
        (["die"], HostLost, None),
        (["wait", "die"], HostLost, None),
    ],
)
async def test_an_engine_that_fails_before_its_first_event_is_an_error_status(
    slot: Slot, streams: bool, script: Any, error: type[CoeError], status: int | None
) -> None:
    if not streams and script in (["400"], ["500"]):
        pytest.skip("error events are of streams only")
    slot.engine.go.set()
    asked = call("a", body={"script": script})
    with pytest.raises(error) as caught:
        await (streamed(slot, asked) if streams else slot.backend.complete(asked))
    assert getattr(caught.value, "status", None) == status
    if status == 400:
        assert caught.value.param == ("temperature" if script == "invalid" else "n")
    if isinstance(caught.value, HostLost):
        assert (caught.value.host, caught.value.sent_tokens) == ("host-1", 0)
    await slot.can_still_turn()


@pytest.mark.parametrize(("fault", "error"), [("500", ExpertFailed), ("die", HostLost)])
async def test_an_engine_that_fails_in_mid_stream_is_never_a_silent_end(
    slot: Slot, fault: str, error: type[CoeError]
) -> None:
    seen: list[bytes] = []
    with pytest.raises(error) as caught:
        async with slot.backend.stream(call("a", "one", "wait", fault)) as stream:
            async for payload in stream:
                seen.append(payload)
                slot.engine.go.set()
    assert len(seen) == 1
    if isinstance(caught.value, HostLost):
        assert caught.value.sent_tokens == 1
    await slot.can_still_turn()


async def test_an_engine_that_ends_without_a_word_is_an_error(slot: Slot) -> None:
    async def nothing() -> AsyncGenerator[str, None]:
        for silence in ():
            yield silence

    async def serve(*_: Any, **__: Any) -> AsyncIterator[str]:
        return nothing()

    slot.engine.serve = serve  # type: ignore[method-assign]
    with pytest.raises(ExpertFailed, match="sent nothing"):
        await streamed(slot, call("a"))
