"""The soak test's upstream: an OpenAI-compatible server that fails on purpose and writes it down.

Fates are drawn from the digest of request id, model and attempt, so a run can be repeated. Every
call leaves one entry in a ledger, which ``GET /ledger?after=N`` hands out; it is the other side of
the gateway's books.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from typing import Any
from urllib.parse import parse_qs

PROMPT_TOKENS = 11
_DARK_EVERY_S, _DARK_S = 40.0, 4.0  # "flaky" answers 500 and nothing else: its breaker has to open
_FATES = {  # model -> (fate, share of its calls)
    "flaky": (("500", 0.03), ("503", 0.02), ("hang", 0.004), ("cut", 0.02), ("refuse", 0.02)),
    "draft": (("500", 0.01), ("cut", 0.01)),
    "final": (("503", 0.02),),
    "backup": (),
}


def _draw(*parts: object) -> float:
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64


class Upstream:
    """The ASGI application."""

    def __init__(self) -> None:
        self._ledger: list[dict[str, Any]] = []
        self._attempts: Counter[tuple[str, str]] = Counter()
        self._began_s = time.monotonic()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] == "/ledger":
            after = int(parse_qs(scope["query_string"].decode())["after"][0])
            await _reply(send, 200, self._ledger[after:])
            return
        headers = dict(scope["headers"])
        body = json.loads(await _read(receive))
        request, model = headers[b"x-request-id"].decode(), body["model"]
        attempt = self._attempts[request, model]
        self._attempts[request, model] += 1
        entry = {"request": request, "model": model, "sent": 0, "tokens": 0, "completed": False}
        entry["fate"] = fate = self._fate(request, model, attempt)
        entry["tokens"] = tokens = 3 + int(9 * _draw("length", request, model))
        try:
            await self._answer(fate, body, tokens, entry, receive, send)
        finally:
            self._ledger.append(entry)

    def _fate(self, request: str, model: str, attempt: int) -> str:
        running_s = time.monotonic() - self._began_s
        if model == "flaky" and running_s % _DARK_EVERY_S > _DARK_EVERY_S - _DARK_S:
            return "500"
        drawn = _draw("fate", request, model, attempt)
        for fate, share in _FATES[model]:
            drawn -= share
            if drawn < 0:
                return fate
        return "ok"

    async def _answer(
        self, fate: str, body: Any, tokens: int, entry: Any, receive: Any, send: Any
    ) -> None:
        if fate in ("500", "503"):
            await _reply(send, int(fate), {"error": {"message": "on purpose", "type": "x"}})
        elif fate == "hang":
            while (await receive())["type"] != "http.disconnect":
                pass
        elif fate == "refuse":
            return  # nothing is sent: uvicorn closes the connection
        else:
            work = asyncio.ensure_future(_generate(fate, body, tokens, entry, send))
            gone = asyncio.ensure_future(_gone(receive))
            try:
                await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (work, gone):
                    task.cancel()
                await asyncio.gather(work, gone, return_exceptions=True)


async def _generate(fate: str, body: Any, tokens: int, entry: Any, send: Any) -> None:
    confidence = -0.1 if _draw("sure", entry["request"]) < 0.6 else -3.0
    usage = {
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": tokens,
        "total_tokens": PROMPT_TOKENS + tokens,
    }
    if not body.get("stream"):
        await asyncio.sleep(0.002 * tokens)
        if fate == "cut":
            return
        entry["completed"] = True
        await _reply(send, 200, _whole(body["model"], tokens, confidence, usage))
        return
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for number in range(tokens):
        if fate == "cut" and number == tokens // 2:
            return
        entry["sent"] += 1
        await _event(send, _chunk(body["model"], number, confidence))
        await asyncio.sleep(0.004)
    last = {"index": 0, "delta": {}, "finish_reason": "stop"}
    await _event(send, _head(body["model"]) | {"choices": [last]})
    await _event(send, _head(body["model"]) | {"choices": [], "usage": usage})
    entry["completed"] = True
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _head(model: str) -> dict[str, Any]:
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": model}


def _chunk(model: str, number: int, logprob: float) -> dict[str, Any]:
    logprobs = {"content": [{"token": "t", "logprob": logprob, "bytes": None, "top_logprobs": []}]}
    delta = {"role": "assistant", "content": f"t{number} "}
    choice = {"index": 0, "delta": delta, "finish_reason": None, "logprobs": logprobs}
    return _head(model) | {"choices": [choice]}


def _whole(model: str, tokens: int, logprob: float, usage: Any) -> dict[str, Any]:
    one = {"token": "t", "logprob": logprob, "bytes": None, "top_logprobs": []}
    message = {"role": "assistant", "content": "t " * tokens}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": "stop",
        "logprobs": {"content": [one] * tokens},
    }
    head = _head(model) | {"object": "chat.completion"}
    return head | {"choices": [choice], "usage": usage}


async def _event(send: Any, payload: dict[str, Any]) -> None:
    data = b"data: " + json.dumps(payload).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _reply(send: Any, status: int, payload: Any) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(payload).encode()})


async def _read(receive: Any) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
