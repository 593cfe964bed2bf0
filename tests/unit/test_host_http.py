"""The host's port without sockets, in virtual time: who may ask, what is refused, what is left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from deployments import host_http
from deployments.host_http import error_response
from experts import errors as e
from experts.upstream_errors import error_from_reply
from tests.contract.host_kit import BODY_BYTES_MAX, PATIENT, QUICK, TOKEN, Slot
from tests.sim.virtual_time import now_ms, run_virtual


class Exchange:
    """One request, as an ASGI server would hand it over. ``leave`` is the client going away."""

    def __init__(self, slot: Slot, body: bytes | dict[str, Any], **headers: str) -> None:
        self._body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._left = asyncio.Event()
        self._read = False
        self.sent: list[dict[str, Any]] = []
        self.on_send: Callable[[], None] = lambda: None
        headers = {"authorization": f"Bearer {TOKEN}"} | headers
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
            "query_string": b"",
        }
        self.task = asyncio.ensure_future(slot.app(scope, self._receive, self._send))

    def leave(self) -> None:
        self._left.set()

    async def _receive(self) -> dict[str, Any]:
        if not self._read:
            self._read = True
            return {"type": "http.request", "body": self._body}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)
        self.on_send()
        await asyncio.sleep(0)

    @property
    def status(self) -> int:
        status: int = self.sent[0]["status"]
        return status

    @property
    def headers(self) -> dict[str, str]:
        return {k.decode(): v.decode() for k, v in self.sent[0]["headers"]}

    @property
    def text(self) -> str:
        return b"".join(m["body"] for m in self.sent[1:]).decode()

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.text)["error"]
        return error


def drive(body: Callable[[Slot], Awaitable[None]], config: Any = PATIENT) -> None:
    """Run ``body`` against a started slot; afterwards nothing may be running or waiting."""

    async def main() -> None:
        slot = Slot(config, clock=now_ms)
        await slot.driver.start()
        await asyncio.wait_for(body(slot), 3_600)
        await asyncio.sleep(1)
        assert slot.at_rest()
        for expert in ("b", "a"):  # no lease is left: the slot can still turn
            assert (await ask(slot, {"model": expert})).status == 200
        await slot.driver.aclose()

    run_virtual(main())


async def ask(slot: Slot, body: bytes | dict[str, Any], **headers: str) -> Exchange:
    exchange = Exchange(slot, body, **headers)
    await exchange.task
    return exchange


def test_without_the_shared_token_nothing_is_served() -> None:
    async def body(slot: Slot) -> None:
        for sent in ("", "Bearer", "Bearer wrong", "Bearer h\xf6st", TOKEN + "x"):
            reply = await ask(slot, {"model": "a"}, authorization=sent)
            assert (reply.status, reply.error["code"]) == (401, "invalid_host_token")
            assert TOKEN not in reply.text
        assert slot.engine.calls == []

    drive(body)


@pytest.mark.parametrize(
    "sent",
    [b"", b"{", b"[]", b'"a"', b"null", b'{"model": NaN}', b'{"x": "\xff"}', b"[" * 9_000],
    ids=["empty", "cut", "list", "string", "null", "nan", "latin1", "deep"],
)
def test_what_is_not_a_json_object_is_the_callers_mistake(sent: bytes) -> None:
    async def body(slot: Slot) -> None:
        reply = await ask(slot, sent)
        assert (reply.status, reply.error["code"]) == (400, "invalid_request")

    drive(body)


def test_a_body_above_the_limit_is_refused() -> None:
    async def body(slot: Slot) -> None:
        assert (await ask(slot, b" " * (BODY_BYTES_MAX + 1))).status == 413
        fits = b'{"model": "a"}'.ljust(BODY_BYTES_MAX)
        assert (await ask(slot, fits)).status == 200

    drive(body)


def test_an_expert_that_is_not_here_is_404_and_names_those_that_are() -> None:
    async def body(slot: Slot) -> None:
        for model in ("c", None, 7, ["a"], {"a": 1}, ""):
            reply = await ask(slot, {"model": model})
            assert (reply.status, reply.error["code"]) == (404, "model_not_found")
            assert "a, b" in reply.error["message"]
            assert reply.headers["x-coe-host"] == "host-1"

    drive(body)


@pytest.mark.parametrize("header", ["x-coe-priority", "x-coe-queue-deadline-ms"])
def test_a_header_that_is_no_number_is_400_by_name(header: str) -> None:
    async def body(slot: Slot) -> None:
        for value in ("high", "nan", "-inf", "1e999", "", "0x10", "1 2"):
            reply = await ask(slot, {"model": "a"}, **{header: value})
            assert (reply.status, reply.error["param"]) == (400, header)
        assert (await ask(slot, {"model": "a"}, **{"x-coe-priority": "-1e300"})).status == 200

    drive(body)


def test_a_deadline_that_has_passed_is_refused_at_once_with_the_wait() -> None:
    async def body(slot: Slot) -> None:
        busy = Exchange(slot, {"model": "a", "script": ["wait"]})
        await asyncio.sleep(1)
        began_ms = now_ms()
        late = await ask(slot, {"model": "b"}, **{"x-coe-queue-deadline-ms": "-5"})
        assert (late.status, late.error["code"]) == (503, "deadline_unreachable")
        assert now_ms() == began_ms
        slot.engine.go.set()
        await busy.task

    drive(body)


def test_what_was_taken_back_once_is_not_taken_back_again() -> None:
    async def body(slot: Slot) -> None:
        slow = Exchange(slot, {"model": "a", "script": ["wait", "late"]})
        await asyncio.sleep(1)
        assert (await ask(slot, {"model": "b"})).status == 200
        await asyncio.sleep(1)
        assert (slot.engine.aborted, slot.engine.running) == (["a"], ["a"])
        second = Exchange(slot, {"model": "b"})
        await asyncio.sleep(100)
        assert slot.engine.aborted == ["a"], "aborted a second time"
        assert not second.task.done()
        slot.engine.go.set()
        await slow.task
        assert json.loads(slow.text)["choices"][0]["message"]["content"] == "late"
        await second.task
        assert slow.headers["x-coe-swap-ms"] == "4.0", "it waited for both swaps to its expert"

    drive(body, QUICK)


def test_a_stream_that_has_begun_is_not_cut_by_a_drain() -> None:
    async def body(slot: Slot) -> None:
        stream = Exchange(slot, {"model": "a", "stream": True, "script": ["one", "wait", "two"]})
        await asyncio.sleep(1)
        assert "one" in stream.text
        other = Exchange(slot, {"model": "b"})
        await asyncio.sleep(100)
        assert not other.task.done()
        slot.engine.go.set()
        await stream.task
        assert "two" in stream.text
        assert stream.text.endswith("[DONE]\n\n")
        await other.task
        assert slot.engine.aborted == []

    drive(body, QUICK)


def test_a_server_that_is_cancelled_before_the_first_byte_keeps_no_lease() -> None:
    async def body(slot: Slot) -> None:
        asked = {"model": "a", "stream": True, "script": ["one", "wait"]}
        exchange = Exchange(slot, asked)
        exchange.on_send = exchange.task.cancel
        await asyncio.wait({exchange.task})
        assert exchange.task.cancelled()
        await asyncio.sleep(0)
        assert slot.engine.aborted == ["a"]

    drive(body)


def test_cancelled_at_any_moment_nothing_is_left_running() -> None:
    async def body(slot: Slot) -> None:
        for turns in range(60):
            slot.engine.go.clear()
            asked = {"model": "ab"[turns % 2], "stream": True, "script": ["one", "wait"]}
            exchange = Exchange(slot, asked)
            for _ in range(turns):
                await asyncio.sleep(0)
            if turns % 3:
                exchange.leave()
            else:
                exchange.task.cancel()
            await asyncio.wait({exchange.task}, timeout=60)
            assert exchange.task.done()
            await asyncio.sleep(0.1)
            assert slot.at_rest(), f"left in turn {turns}"

    drive(body)


def test_an_answer_made_in_the_turn_of_a_cancellation_is_closed() -> None:
    closed: list[str] = []

    class Stream:
        async def aclose(self) -> None:
            closed.append("stream")

    async def main() -> None:
        made: asyncio.Future[Stream] = asyncio.get_running_loop().create_future()

        async def work() -> Stream:
            return await made

        waiting = asyncio.ensure_future(host_http._unless(work(), asyncio.Event().wait()))
        await asyncio.sleep(0)
        made.set_result(Stream())
        await asyncio.sleep(0)  # the work has its result, whoever waits for it has not run yet
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()

    run_virtual(main())
    assert closed == ["stream"]


def test_an_engine_that_ends_without_a_word_is_an_error() -> None:
    async def nothing() -> AsyncGenerator[str, None]:
        for silence in ():
            yield silence

    async def serve(*_: Any, **__: Any) -> AsyncIterator[str]:
        return nothing()

    async def body(slot: Slot) -> None:
        served, slot.engine.serve = slot.engine.serve, serve  # type: ignore[method-assign]
        reply = await ask(slot, {"model": "a", "stream": True})
        assert (reply.status, reply.error["code"]) == (502, "expert_failed")
        slot.engine.serve = served  # type: ignore[method-assign]

    drive(body)


# --- errors on their way to the gateway -----------------------------------------------------------

RAISED: list[e.CoeError] = [
    e.QueueFull("x", 7, 2_500.0),
    e.DeadlineUnreachable("x", wait_ms=900.5, deadline_ms=200.0),
    e.DeadlineUnreachable("x", wait_ms=900.5, deadline_ms=200.0, retry_after_ms=700.5),
    e.ExpertOutOfService("x", "canary differs"),
    e.HostUnavailable("x", 1_234.0),
    e.HostLost("x", "host-1"),
]
AS_EXPERT_FAILED: list[tuple[e.CoeError, int, str | None]] = [
    (e.InvalidRequest("temperature", "too hot"), 400, "temperature"),
    (e.AuthenticationFailed("no"), 401, None),
    (e.UnknownModel("x", ("a",)), 404, "model"),
    (e.BodyTooLarge(5), 413, None),
    (e.PlacementRefused("x", "it is resident"), 409, None),
    (e.ExpertFailed("x", 500, "exploded"), 502, None),
]


def returned(error: e.CoeError) -> e.CoeError:
    reply = error_response(error, "host-1")
    return error_from_reply(
        expert="x",
        status=reply.status_code,
        headers=reply.headers,
        body=bytes(reply.body),
        waited_ms=1.0,
    )


def test_every_code_of_the_port_is_in_these_tests() -> None:
    named = {type(error) for error in RAISED} | {type(error) for error, *_ in AS_EXPERT_FAILED}
    assert named == set(host_http._STATUS)


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
def test_an_error_comes_back_as_the_class_and_fields_that_were_raised(error: e.CoeError) -> None:
    back = returned(error)
    assert type(back) is type(error)
    assert vars(back) == vars(error)


@pytest.mark.parametrize(("error", "status", "param"), AS_EXPERT_FAILED)
def test_other_errors_come_back_with_status_code_and_field(
    error: e.CoeError, status: int, param: str | None
) -> None:
    back = returned(error)
    assert isinstance(back, e.ExpertFailed)
    assert (back.status, back.error_code) == (status, host_http._STATUS[type(error)][1])
    assert back.param == param
    assert back.message.count("answered") == 1


def test_the_gateways_own_fault_is_not_shown_to_the_caller() -> None:
    assert "Bearer" not in returned(e.AuthenticationFailed("no")).message
