"""A shipped fake expert: deterministic answers in full OpenAI shape, for tests and benchmarks.

A script is written like a URL query, ``behaviour?option=value&...``:

    echo                             the last user message, word by word
    fixed?text=Paris.                that text
    tokens?count=50&pace_ms=10       "t0 t1 ...", one token each 10 ms
    tool_call                        a call of the request's first tool
    tool_calls                       a call of each of the request's tools
    fail?status=503&code=queue_full  an error answer
    disconnect?after=3               the connection breaks after three tokens

Options of every behaviour that answers: ``pace_ms`` between tokens, ``delay_ms`` before the first,
``confidence`` (each token's probability, 0..1], ``count``, ``reasoning`` (a thought before the
answer), ``arguments`` (of its calls, as JSON text). The same names can stand in an expert's
``options``. To a request for embeddings each gives vectors made from the texts' digests.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar
from urllib.parse import parse_qsl

import msgspec

from experts.errors import CoeError, ConfigError, HostLost
from experts.protocol import CallTimings, ExpertCall, ExpertReply
from experts.scripted_embeddings import render_embeddings
from experts.types import Endpoint
from experts.upstream_errors import error_from_reply

__all__ = ["Script", "ScriptedBackend", "refusal", "render_chunks", "render_reply"]

Sleep = Callable[[float], Awaitable[None]]
_CREATED = 1_700_000_000  # fixed, so that equal requests get equal bytes
_COUNT_DEFAULT = 8
_CALLING = frozenset({"tool_call", "tool_calls"})


@dataclass(frozen=True, slots=True)
class Script:
    """What a scripted expert does. Times in milliseconds, ``confidence`` is a probability."""

    behaviour: str = "echo"
    text: str = ""
    count: int = _COUNT_DEFAULT
    pace_ms: float = 0.0
    delay_ms: float = 0.0
    confidence: float = 0.9
    reasoning: str = ""
    arguments: str = "{}"
    status: int = 500
    code: str = "scripted"
    after: int = 0
    queue_ms: float = 0.0
    swap_ms: float = 0.0

    BEHAVIOURS: ClassVar[tuple[str, ...]] = (
        "echo",
        "fixed",
        "tokens",
        "tool_call",
        "tool_calls",
        "fail",
        "disconnect",
    )

    @classmethod
    def parse(cls, text: str, options: Mapping[str, Any] | None = None) -> Script:
        """Read ``behaviour?option=value``; ``options`` are applied on top.

        Raises:
            ConfigError: an unknown behaviour or option, or a value that does not fit.
        """
        behaviour, _, query = text.partition("?")
        if behaviour not in cls.BEHAVIOURS:
            known = ", ".join(cls.BEHAVIOURS)
            raise ConfigError(text, None, "behaviour", f"unknown; known are {known}")
        given = {**dict(parse_qsl(query, keep_blank_values=True)), **(options or {})}
        script = replace(cls(behaviour), **{k: _option(text, k, v) for k, v in given.items()})
        if not 0.0 < script.confidence <= 1.0:
            raise ConfigError(text, None, "confidence", "must lie in (0, 1]")
        return script

    @property
    def logprob(self) -> float:
        return math.log(self.confidence)


_CONVERTERS: Mapping[str, Callable[[Any], Any]] = {"str": str, "int": int, "float": float}
_OPTION_TYPES = {f.name: str(f.type) for f in fields(Script) if f.name != "behaviour"}


def _option(script: str, name: str, value: Any) -> Any:
    if name not in _OPTION_TYPES:
        known = ", ".join(_OPTION_TYPES)
        raise ConfigError(script, None, name, f"unknown option; known are {known}")
    try:
        return _CONVERTERS[_OPTION_TYPES[name]](value)
    except (TypeError, ValueError) as error:
        raise ConfigError(script, None, name, f"{value!r} is not {_OPTION_TYPES[name]}") from error


class ScriptedBackend:
    """The script in process, as a ``Backend``. ``cancelled`` counts calls left early."""

    def __init__(self, script: Script, *, sleep: Sleep = asyncio.sleep) -> None:
        self._script = script
        self._sleep = sleep
        self.calls = 0
        self.cancelled = 0

    async def complete(self, call: ExpertCall) -> ExpertReply:
        self.calls += 1
        self._refuse(call)
        try:
            await self._pause(self._script.delay_ms)
            for _ in answer_tokens(self._script, call.body):
                await self._pause(self._script.pace_ms)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self._script.behaviour == "disconnect":
            raise HostLost(call.expert, "scripted")
        return ExpertReply(
            render_reply(self._script, call.endpoint, call.body, call.expert), self._timings()
        )

    @asynccontextmanager
    async def stream(self, call: ExpertCall) -> AsyncIterator[ScriptedStream]:
        self.calls += 1
        self._refuse(call)
        stream = ScriptedStream(self._script, call, self._sleep, self._timings())
        try:
            yield stream
        finally:
            if not stream.ended:
                self.cancelled += 1

    async def aclose(self) -> None:
        """Nothing to close."""

    def _refuse(self, call: ExpertCall) -> None:
        if (error := refusal(self._script, call.expert)) is not None:
            raise error

    async def _pause(self, wait_ms: float) -> None:
        if wait_ms > 0:
            await self._sleep(wait_ms / 1000.0)

    def _timings(self) -> CallTimings:
        return CallTimings("scripted", self._script.queue_ms, self._script.swap_ms)


class ScriptedStream:
    """Iterate once for the payloads of a scripted answer, at the script's pace."""

    def __init__(self, script: Script, call: ExpertCall, sleep: Sleep, timings: CallTimings):
        self._script = script
        self._call = call
        self._sleep = sleep
        self.timings = timings
        self.ended = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        script, call = self._script, self._call
        if script.delay_ms > 0:
            await self._sleep(script.delay_ms / 1000.0)
        for index, payload in enumerate(
            render_chunks(script, call.endpoint, call.body, call.expert)
        ):
            if script.behaviour == "disconnect" and index >= script.after:
                self.ended = True
                raise HostLost(call.expert, "scripted", sent_tokens=index)
            if index and script.pace_ms > 0:
                await self._sleep(script.pace_ms / 1000.0)
            yield payload
        self.ended = True


def refusal(script: Script, expert: str) -> CoeError | None:
    """The error a failing script answers with, as a client of it would read it off the wire."""
    if script.behaviour != "fail":
        return None
    return error_from_reply(
        expert=expert,
        status=script.status,
        headers={},
        body=refusal_body(script),
        waited_ms=0.0,
    )


def refusal_body(script: Script) -> bytes:
    """The error body a failing script sends."""
    message = f"scripted failure with status {script.status}"
    error = {"message": message, "type": "server_error", "param": None, "code": script.code}
    return msgspec.json.encode({"error": error})


def answer_tokens(script: Script, body: Mapping[str, Any]) -> list[str]:
    """The answer's tokens, after ``max_tokens`` and ``stop`` of the request."""
    if script.behaviour in _CALLING:
        return []
    tokens = _raw_tokens(script, body)
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    return _before_stop(tokens, body.get("stop"))[:limit]


def _raw_tokens(script: Script, body: Mapping[str, Any]) -> list[str]:
    match script.behaviour:
        case "tokens":
            return [f"t{i} " for i in range(script.count)]
        case "disconnect":
            return [f"t{i} " for i in range(script.after + 1)]
        case "fixed":
            return _words(script.text)
        case _:
            return _words(_last_user_text(body))


def _words(text: str) -> list[str]:
    words = text.split(" ")
    return [word + " " for word in words[:-1]] + words[-1:] if text else []


def _last_user_text(body: Mapping[str, Any]) -> str:
    if not body.get("messages"):
        prompt = body.get("prompt", "")
        return prompt if isinstance(prompt, str) else ""
    for message in reversed(body["messages"]):
        if message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                return content
            return " ".join(part["text"] for part in content or () if part.get("type") == "text")
    return ""


def _before_stop(tokens: list[str], stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else list(stop or ())
    text = "".join(tokens)
    cuts = [at for at in (text.find(s) for s in stops) if at >= 0]
    return _words(text[: min(cuts)]) if cuts else tokens


def render_reply(
    script: Script, endpoint: Endpoint, body: Mapping[str, Any], model: str
) -> dict[str, Any]:
    """A whole OpenAI response body."""
    if endpoint is Endpoint.EMBEDDINGS:
        return render_embeddings(body, model)
    tokens = answer_tokens(script, body)
    chat = endpoint is Endpoint.CHAT
    make = _chat_choice if chat else _text_choice
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-scripted",
        "object": "chat.completion" if chat else "text_completion",
        "created": _CREATED,
        "model": model,
        "choices": [make(script, body, tokens, i) for i in range(body.get("n") or 1)],
        "usage": _usage(script, body, tokens),
    }


def _chat_choice(
    script: Script, body: Mapping[str, Any], tokens: list[str], index: int
) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(tokens), "refusal": None}
    if script.reasoning:
        message["reasoning_content"] = script.reasoning
    if script.behaviour in _CALLING:
        message |= {"content": None, "tool_calls": _tool_calls(script, body)}
    return {
        "index": index,
        "message": message,
        "logprobs": _chat_logprobs(script, tokens, body) if body.get("logprobs") else None,
        "finish_reason": _finish_reason(script, body, tokens),
    }


def _text_choice(
    script: Script, body: Mapping[str, Any], tokens: list[str], index: int
) -> dict[str, Any]:
    return {
        "index": index,
        "text": "".join(tokens),
        "logprobs": _text_logprobs(script, tokens, body)
        if body.get("logprobs") is not None
        else None,
        "finish_reason": _finish_reason(script, body, tokens),
    }


def _tool_calls(script: Script, body: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = [tool["function"]["name"] for tool in body.get("tools") or ()] or ["none"]
    called = names if script.behaviour == "tool_calls" else names[:1]
    return [
        {
            "id": f"call_{index}",
            "type": "function",
            "function": {"name": name, "arguments": script.arguments},
        }
        for index, name in enumerate(called)
    ]


def _finish_reason(script: Script, body: Mapping[str, Any], tokens: Sequence[str]) -> str:
    if script.behaviour in _CALLING:
        return "tool_calls"
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    cut = limit is not None and len(_before_stop(_raw_tokens(script, body), body.get("stop")))
    return "length" if cut and cut > len(tokens) else "stop"


def _chat_logprobs(
    script: Script, tokens: Sequence[str], body: Mapping[str, Any]
) -> dict[str, Any]:
    content = [
        {
            "token": token,
            "logprob": script.logprob,
            "bytes": list(token.encode()),
            "top_logprobs": [
                {"token": other, "logprob": logprob, "bytes": list(other.encode())}
                for other, logprob in _top(script, token, body.get("top_logprobs") or 0).items()
            ],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _top(script: Script, token: str, count: int) -> dict[str, float]:
    """The token, and others that share what it leaves of the probability."""
    others = max(0, count - 1)
    shared = math.log(max(1.0 - script.confidence, 1e-9) / max(1, others))
    rest = {f"{token}~{number}": shared for number in range(others)}
    return {token: script.logprob, **rest} if count else {}


def _text_logprobs(
    script: Script, tokens: Sequence[str], body: Mapping[str, Any]
) -> dict[str, Any]:
    offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    return {
        "tokens": list(tokens),
        "token_logprobs": [script.logprob] * len(tokens),
        "top_logprobs": [_top(script, token, body["logprobs"] or 1) for token in tokens],
        "text_offset": offsets,
    }


def _usage(script: Script, body: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, int]:
    prompt = len(_words(_last_user_text(body)))
    output = max(1, len(tokens)) * (body.get("n") or 1)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
    }


def render_chunks(
    script: Script, endpoint: Endpoint, body: Mapping[str, Any], model: str
) -> list[bytes]:
    """The payloads of a streamed answer, ``[DONE]`` excluded: one chunk per token and choice."""
    chat = endpoint is Endpoint.CHAT
    tokens = answer_tokens(script, body)
    head = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-scripted",
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": _CREATED,
        "model": model,
    }
    choices = _chat_deltas(script, body, tokens) if chat else _text_deltas(script, body, tokens)
    chunks: list[dict[str, Any]] = [
        head | {"choices": [choice | {"index": index}]}
        for choice in choices
        for index in range(body.get("n") or 1)
    ]
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append(head | {"choices": [], "usage": _usage(script, body, tokens)})
    return [msgspec.json.encode(chunk) for chunk in chunks]


def _chat_deltas(
    script: Script, body: Mapping[str, Any], tokens: Sequence[str]
) -> list[dict[str, Any]]:
    asked = bool(body.get("logprobs"))
    deltas: list[dict[str, Any]] = [{"content": token} for token in tokens]
    if script.behaviour in _CALLING:
        deltas = list(_call_deltas(_tool_calls(script, body)))
    if script.reasoning:
        deltas = [{"reasoning_content": script.reasoning}, *deltas]
    if deltas:
        deltas[0] = {"role": "assistant", **deltas[0]}
    choices = [
        {
            "delta": delta,
            "logprobs": _chat_logprobs(script, [delta["content"]], body)
            if asked and "content" in delta
            else None,
            "finish_reason": None,
        }
        for delta in deltas
    ]
    end: dict[str, Any] = {
        "delta": {},
        "logprobs": None,
        "finish_reason": _finish_reason(script, body, tokens),
    }
    return [*choices, end]


def _call_deltas(calls: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each call's name first, then its arguments in two pieces, as servers send them."""
    for index, call in enumerate(calls):
        arguments = call["function"]["arguments"]
        half = len(arguments) // 2
        opened = call["function"] | {"arguments": ""}
        yield {"tool_calls": [call | {"index": index, "function": opened}]}
        for piece in filter(None, (arguments[:half], arguments[half:])):
            yield {"tool_calls": [{"index": index, "function": {"arguments": piece}}]}


def _text_deltas(
    script: Script, body: Mapping[str, Any], tokens: Sequence[str]
) -> list[dict[str, Any]]:
    asked = body.get("logprobs") is not None
    last = len(tokens) - 1
    reason = _finish_reason(script, body, tokens)
    return [
        {
            "text": token,
            "logprobs": _text_logprobs(script, [token], body) if asked else None,
            "finish_reason": reason if i == last else None,
        }
        for i, token in enumerate(tokens)
    ] or [{"text": "", "logprobs": None, "finish_reason": reason}]
