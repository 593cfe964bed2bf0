"""The host's own port over real sockets: HttpBackend on one side, a slot and its engine behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from experts.errors import CoeError, ExpertFailed, HostLost, HostUnavailable
from experts.http_backend import HttpBackend
from experts.protocol import ExpertCall
from experts.types import Endpoint
from tests.contract.gateway_kit import eventually, served
from tests.contract.host_kit import BODY_BYTES_MAX, PATIENT, QUICK, TOKEN, Slot


class ServedSlot(Slot):
    """A slot that listens, and the gateway's client of it."""

    url: str
    backend: HttpBackend

    async def can_still_turn(self) -> None:
        """The proof that no lease is left: both experts can be made resident and answer."""
        await eventually(self.at_rest)
        for expert in ("a", "b", "a"):
            assert text_of(await self.backend.complete(call(expert))) == "hello"


@pytest.fixture(params=[PATIENT], ids=["patient"])
async def slot(request: Any) -> AsyncIterator[ServedSlot]:
    slot = ServedSlot(request.param)
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
        "timeout_ms": 30_000.0,
        "first_token_timeout_ms": 30_000.0,
        "idle_timeout_ms": 30_000.0,
    }
    return ExpertCall(**fields | changes)


def text_of(reply: Any) -> str:
    text: str = reply.body["choices"][0]["message"]["content"]
    return text


async def streamed(slot: ServedSlot, asked: ExpertCall) -> str:
    async with slot.backend.stream(asked) as stream:
        parts = [json.loads(payload) async for payload in stream]
    return "".join(part["choices"][0]["delta"]["content"] for part in parts)


# --- answers --------------------------------------------------------------------------------------


async def test_whole_answers_and_streams_tell_what_they_waited_for(slot: ServedSlot) -> None:
    reply = await slot.backend.complete(call("a"))
    assert text_of(reply) == "hello"
    assert reply.timings.host == "host-1"
    assert reply.timings.swap_ms > 0, "the first request of all has to wait for a swap"
    async with slot.backend.stream(call("a", "one ", "two")) as stream:
        assert stream.timings.swap_ms == 0
        assert [p async for p in stream][-1].endswith(b'"finish_reason": "stop"}]}')
    assert await streamed(slot, call("b", "one ", "two")) == "one two"
    await slot.can_still_turn()


async def test_health_needs_no_token_and_tells_when_the_engine_is_dead(slot: ServedSlot) -> None:
    async with httpx2.AsyncClient(base_url=slot.url) as client:
        assert (await client.get("/health")).json() == {"status": "ok", "host": "host-1"}
        slot.engine.dead = True
        assert (await client.get("/health")).status_code == 503


# --- clients that leave ---------------------------------------------------------------------------


async def test_a_client_that_leaves_the_queue_takes_its_place_along(slot: ServedSlot) -> None:
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
    slot: ServedSlot, streams: bool, swallows: bool
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


async def test_a_client_that_leaves_in_mid_stream_ends_the_generation(slot: ServedSlot) -> None:
    async with slot.backend.stream(call("a", "one", "wait", "two")) as stream:
        async for _ in stream:
            break
        assert slot.engine.running == ["a"]
    await eventually(lambda: slot.engine.aborted == ["a"])
    await slot.can_still_turn()


# --- drains ---------------------------------------------------------------------------------------


@quick
@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("swallows", [True, False])
async def test_a_drain_takes_back_what_has_sent_nothing_and_answers_it_later(
    slot: ServedSlot, streams: bool, swallows: bool
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


async def test_a_host_that_closes_sends_its_callers_elsewhere(slot: ServedSlot) -> None:
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


@pytest.mark.parametrize(
    ("script", "streams", "error", "status"),
    [
        ("invalid", True, ExpertFailed, 400),
        ("invalid", False, ExpertFailed, 400),
        (["400"], True, ExpertFailed, 400),
        (["500"], True, ExpertFailed, 502),
        (["die"], True, HostLost, None),
        (["die"], False, HostLost, None),
    ],
)
async def test_an_engine_that_fails_before_its_first_event_is_an_error_status(
    slot: ServedSlot, script: Any, streams: bool, error: type[CoeError], status: int | None
) -> None:
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
    slot: ServedSlot, fault: str, error: type[CoeError]
) -> None:
    async with slot.backend.stream(call("a", "one", "wait", fault)) as stream:
        events = aiter(stream)
        await anext(events)
        slot.engine.go.set()
        with pytest.raises(error) as caught:
            await anext(events)
    if isinstance(caught.value, HostLost):
        assert caught.value.sent_tokens == 1
    await slot.can_still_turn()


async def test_a_body_above_the_limit_is_refused_although_the_client_sends_it_all(
    slot: ServedSlot,
) -> None:
    with pytest.raises(ExpertFailed) as caught:
        await slot.backend.complete(call("a", "x" * 300 * BODY_BYTES_MAX))
    assert (caught.value.status, caught.value.error_code) == (413, "body_too_large")


async def test_the_expert_that_may_be_asked_next_is_announced_to_the_slot(
    slot: ServedSlot,
) -> None:
    announced: list[str] = []
    slot.driver.announce = announced.append  # type: ignore[method-assign]
    for likely_next in ("b", "a", "another host's", None):
        await slot.backend.complete(call("a", likely_next=likely_next))
    assert announced == ["b"]
