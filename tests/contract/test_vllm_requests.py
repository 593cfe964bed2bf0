"""What vLLM says about a request, as this project's errors. Real vLLM classes, no engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse
from vllm.exceptions import (
    QueueOverflowError,
    VLLMUnprocessableEntityError,
    VLLMValidationError,
)
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from experts.errors import CoeError, ExpertFailed, HostLost, HostUnavailable, InvalidRequest
from experts.types import AnswerParsers, Endpoint
from experts.vllm_engine import Canary, EngineSettings, Pooled, SwappableEngine
from experts.vllm_serving import wrong_parsers

USER = [{"role": "user", "content": "x"}]
Answer = Callable[[Any], Awaitable[Any]]


def make_engine(answer: Answer) -> tuple[SwappableEngine, Any]:
    """An engine with expert ``x``, whose serving layer is ``answer``; and its fake AsyncLLM."""
    fake = SimpleNamespace(errored=False)
    engine = SwappableEngine(fake, EngineSettings())
    engine._pooled["x"] = Pooled("x", 1, "d" * 64, Canary(1, -0.5), 0.1)
    engine._serving["x"] = SimpleNamespace(
        openai_serving_chat=SimpleNamespace(create_chat_completion=answer),
        openai_serving_completion=SimpleNamespace(create_completion=answer),
    )
    return engine, fake


async def refusal(
    engine: SwappableEngine, body: dict[str, Any], endpoint: Endpoint = Endpoint.CHAT
) -> CoeError:
    with pytest.raises(CoeError) as caught:
        await engine.serve("x", endpoint, body, request_id="r")
    return caught.value


async def unreached(_: Any) -> Any:
    raise AssertionError("a request that is wrong reached the serving layer")


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"structured_outputs": {"json": "{}", "regex": "a"}}, None),
        ({"structured_outputs": "json"}, None),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"logprobs": True, "top_logprobs": -3}, "top_logprobs"),
        ({"messages": "hi"}, "messages"),
        ({"tools": [5], "tool_choice": {"type": "function", "function": {"name": "f"}}}, None),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"cache_salt": "a/b"}, "cache_salt"),
    ],
)
async def test_a_mistake_in_a_chat_request_is_the_callers_and_names_the_field(
    wrong: dict[str, Any], param: str | None
) -> None:
    engine, _ = make_engine(unreached)
    error = await refusal(engine, {"messages": USER} | wrong)
    assert isinstance(error, InvalidRequest)
    assert error.param == param


@pytest.mark.parametrize("endpoint", [Endpoint.CHAT, Endpoint.COMPLETIONS])
async def test_no_caller_decides_over_the_engine_s_queue_or_its_transfers(
    endpoint: Endpoint,
) -> None:
    """Whatever the operator has switched on in the engine."""
    seen: list[Any] = []

    async def answer(request: Any) -> Any:
        seen.append(request)
        return ErrorResponse(error=ErrorInfo(message="no", type="t", code=500))

    engine, _ = make_engine(answer)
    asked = {"messages": USER} if endpoint is Endpoint.CHAT else {"prompt": "x"}
    wished = {
        "priority": -5,
        "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "elsewhere"},
        "request_id": "mine",
        "seed": 7,
    }
    await refusal(engine, asked | wished, endpoint)
    (request,) = seen
    assert (request.priority, request.kv_transfer_params) == (0, None)
    assert request.request_id.startswith("r-")
    assert request.seed == 7


@pytest.mark.parametrize(
    ("wrong", "param"),
    [({"prompt": ""}, "prompt"), ({"logprobs": "many"}, "logprobs"), ({"n": "two"}, "n")],
)
async def test_a_mistake_in_a_completion_request_too(wrong: dict[str, Any], param: str) -> None:
    engine, _ = make_engine(unreached)
    error = await refusal(engine, {"prompt": "x"} | wrong, Endpoint.COMPLETIONS)
    assert isinstance(error, InvalidRequest)
    assert error.param == param


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (VLLMValidationError("too long", parameter="input_tokens"), (InvalidRequest, "messages")),
        (VLLMValidationError("n must be at least 1", parameter="n"), (InvalidRequest, "n")),
        (VLLMUnprocessableEntityError("no such image"), (InvalidRequest, None)),
        (ValueError("Input length exceeds"), (InvalidRequest, None)),
        (EngineGenerateError("boom"), (ExpertFailed, None)),
        (QueueOverflowError(), (HostUnavailable, None)),
        (EngineDeadError(), (HostLost, None)),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_whose_fault_an_error_is(
    raised: Exception, expected: tuple[type[CoeError], str | None]
) -> None:
    async def answer(_: Any) -> Any:
        raise raised

    engine, _ = make_engine(answer)
    error = await refusal(engine, {"messages": USER})
    assert (type(error), error.param) == expected


async def test_an_error_that_is_nobodys_known_mistake_is_not_dressed_up() -> None:
    async def answer(_: Any) -> Any:
        raise ZeroDivisionError

    engine, _ = make_engine(answer)
    with pytest.raises(ZeroDivisionError):
        await engine.serve("x", Endpoint.CHAT, {"messages": USER}, request_id="r")


@pytest.mark.parametrize(("code", "kind"), [(404, InvalidRequest), (500, ExpertFailed)])
async def test_an_error_body_is_raised(code: int, kind: type[CoeError]) -> None:
    async def answer(_: Any) -> Any:
        return ErrorResponse(error=ErrorInfo(message="no", type="t", code=code, param="model"))

    engine, _ = make_engine(answer)
    error = await refusal(engine, {"messages": USER})
    assert (type(error), error.param) == (kind, "model")


async def test_ids_are_unique_and_the_cache_belongs_to_weights_and_caller() -> None:
    seen: list[Any] = []

    async def answer(request: Any) -> Any:
        seen.append(request)
        return ErrorResponse(error=ErrorInfo(message="stop here", type="t", code=400))

    engine, _ = make_engine(answer)
    for salt in (None, "mine", None):
        await refusal(engine, {"messages": USER, "cache_salt": salt})
        await refusal(engine, {"prompt": "x", "cache_salt": salt}, Endpoint.COMPLETIONS)
    assert len({request.request_id for request in seen}) == 6
    salts = [request.cache_salt for request in seen]
    assert salts[0] == salts[1] == salts[4]
    assert len(set(salts)) == 2
    assert "d" * 16 in salts[0]
    assert {request.model for request in seen} == {"x"}


async def test_a_cancelled_whole_answer_stays_cancelled_although_vllm_makes_it_an_error() -> None:
    begun = asyncio.Event()

    async def answer(_: Any) -> Any:
        try:
            begun.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return ErrorResponse(error=ErrorInfo(message="Client disconnected", type="t", code=400))

    engine, _ = make_engine(answer)
    asked = engine.serve("x", Endpoint.CHAT, {"messages": USER}, request_id="r")
    task = asyncio.ensure_future(asked)
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


ERROR_EVENT = 'data: {"error": {"message": "EngineCore", "code": 500}}\n\n'


def streaming(*events: str, ended: list[str]) -> Answer:
    async def stream() -> AsyncGenerator[str, None]:
        try:
            for event in events:
                yield event
        finally:
            ended.append("closed")

    async def answer(_: Any) -> Any:
        return stream()

    return answer


@pytest.mark.parametrize("dead", [True, False])
async def test_an_error_event_means_a_lost_host_only_when_the_engine_is_dead(dead: bool) -> None:
    ended: list[str] = []
    engine, fake = make_engine(streaming("data: {}\n\n", ERROR_EVENT, ended=ended))
    asked = {"messages": USER, "stream": True}
    stream = await engine.serve("x", Endpoint.CHAT, asked, request_id="r")
    assert not isinstance(stream, dict)
    assert await anext(stream) == "data: {}\n\n"
    fake.errored = dead
    if dead:
        with pytest.raises(HostLost):
            await anext(stream)
        with pytest.raises(HostLost):
            await engine.check_health()
    else:
        assert await anext(stream) == ERROR_EVENT
        await engine.check_health()


async def test_closing_a_stream_closes_vllms() -> None:
    ended: list[str] = []
    engine, _ = make_engine(streaming("data: {}\n\n", "data: {}\n\n", ended=ended))
    asked = {"prompt": "x", "stream": True}
    stream: Any = await engine.serve("x", Endpoint.COMPLETIONS, asked, request_id="r")
    await anext(stream)
    await stream.aclose()
    assert ended == ["closed"]


def test_a_parser_that_vllm_does_not_have_is_refused_by_name() -> None:
    good = AnswerParsers("hermes", "qwen3")
    assert wrong_parsers({"a": good, "b": AnswerParsers()}) == {}
    wrong = wrong_parsers(
        {"a": AnswerParsers("hermess"), "b": AnswerParsers(None, "qwen"), "c": good}
    )
    assert set(wrong) == {"a", "b"}
    assert "tool_call_parser 'hermess' is not one of" in wrong["a"]
    assert "hermes," in wrong["a"]
    assert "reasoning_parser 'qwen' is not one of" in wrong["b"]
