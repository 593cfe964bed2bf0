"""The scripted expert as an ASGI server: ``uvicorn experts.scripted_server:app``.

``model`` in a request is a script (``experts.scripted``), or a name given to ``ScriptedServer``.
It answers as an OpenAI-compatible upstream does, breaks its connections when told to, and counts
what it saw in ``stats`` so that tests can prove a cancellation reached it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import msgspec

from experts.errors import ConfigError
from experts.scripted import (
    Script,
    answer_tokens,
    refusal_body,
    render_chunks,
    render_reply,
)
from experts.types import Endpoint

__all__ = ["ScriptedServer", "ServerStats", "app"]

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_ENDPOINTS = {f"/v1/{endpoint.value}": endpoint for endpoint in Endpoint}
_SCRIPTS_MAX = 256


@dataclass(slots=True)
class ServerStats:
    """What the server has seen since it started."""

    requests: int = 0
    completed: int = 0
    disconnected: int = 0
    last_body: dict[str, Any] | None = None
    last_headers: dict[str, str] | None = None


class ScriptedServer:
    """An ASGI application. ``scripts`` names experts; any other name is read as a script."""

    def __init__(self, scripts: Mapping[str, Script] | None = None) -> None:
        self._named = dict(scripts or {})
        self._parsed: dict[str, Script] = {}
        self.stats = ServerStats()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["path"] == "/v1/models":
            await _send_json(send, 200, msgspec.json.encode(self._models()))
        elif endpoint := _ENDPOINTS.get(scope["path"]):
            await self._answer(endpoint, scope, receive, send)
        else:
            await _send_json(send, 404, _error("no such path", "not_found"))

    async def _answer(
        self, endpoint: Endpoint, scope: MutableMapping[str, Any], receive: Receive, send: Send
    ) -> None:
        self.stats.requests += 1
        body = msgspec.json.decode(await _read(receive))
        self.stats.last_body = body
        self.stats.last_headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        try:
            script = self._script(body["model"])
        except ConfigError as error:
            await _send_json(send, 404, _error(error.message, "model_not_found"))
            return
        answer = self._stream if body.get("stream") else self._complete
        watch = asyncio.ensure_future(_gone(receive))
        work = asyncio.ensure_future(answer(script, endpoint, body, send))
        await asyncio.wait({watch, work}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            self.stats.disconnected += 1
        for task in (watch, work):
            task.cancel()
        await asyncio.gather(watch, work, return_exceptions=True)
        if not work.cancelled():
            work.result()

    def _script(self, model: str) -> Script:
        if (named := self._named.get(model)) is not None:
            return named
        if model not in self._parsed:
            if len(self._parsed) >= _SCRIPTS_MAX:
                self._parsed.clear()
            self._parsed[model] = Script.parse(model)
        return self._parsed[model]

    def _models(self) -> dict[str, Any]:
        names = [*self._named, *Script.BEHAVIOURS]
        data = [{"id": n, "object": "model", "created": 0, "owned_by": "scripted"} for n in names]
        return {"object": "list", "data": data}

    async def _complete(
        self, script: Script, endpoint: Endpoint, body: Mapping[str, Any], send: Send
    ) -> None:
        if script.behaviour == "fail":
            await _send_json(send, script.status, refusal_body(script))
            return
        wait_ms = script.delay_ms + script.pace_ms * len(answer_tokens(script, body))
        if wait_ms > 0:
            await asyncio.sleep(wait_ms / 1000.0)
        if script.behaviour == "disconnect":
            await send(_start(200, b"application/json", script))
            return  # the response stays incomplete: the server closes the connection
        reply = render_reply(script, endpoint, body, body["model"])
        await _send_json(send, 200, msgspec.json.encode(reply), script)
        self.stats.completed += 1

    async def _stream(
        self, script: Script, endpoint: Endpoint, body: Mapping[str, Any], send: Send
    ) -> None:
        if script.behaviour == "fail":
            await _send_json(send, script.status, refusal_body(script))
            return
        if script.delay_ms > 0:
            await asyncio.sleep(script.delay_ms / 1000.0)
        await send(_start(200, b"text/event-stream", script))
        for index, payload in enumerate(render_chunks(script, endpoint, body, body["model"])):
            if script.behaviour == "disconnect" and index >= script.after:
                return  # the response stays incomplete: the server closes the connection
            if index and script.pace_ms > 0:
                await asyncio.sleep(script.pace_ms / 1000.0)
            data = b"data: %b\n\n" % payload
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        self.stats.completed += 1


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _read(receive: Receive) -> bytes:
    parts: list[bytes] = []
    more = True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _start(status: int, content_type: bytes, script: Script | None) -> dict[str, Any]:
    headers = [(b"content-type", content_type), (b"x-coe-host", b"scripted")]
    if script is not None:
        headers += [
            (b"x-coe-queue-ms", b"%.1f" % script.queue_ms),
            (b"x-coe-swap-ms", b"%.1f" % script.swap_ms),
        ]
    return {"type": "http.response.start", "status": status, "headers": headers}


async def _send_json(send: Send, status: int, body: bytes, script: Script | None = None) -> None:
    start = _start(status, b"application/json", script)
    start["headers"].append((b"content-length", b"%d" % len(body)))
    await send(start)
    await send({"type": "http.response.body", "body": body})


def _error(message: str, code: str) -> bytes:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return msgspec.json.encode({"error": error})


app = ScriptedServer()
