"""One gateway for the contract suites of all APIs, and their official clients, strict."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx2
import msgspec
from anthropic import AsyncAnthropic

from experts.scripted import Script, ScriptedBackend
from experts.types import Capability
from gateway.app import HttpLimits
from gateway.openai_http import KeepAlive
from tests.contract.gateway_kit import CASCADE_POLICY, PLAIN_POLICY, Gateway, make_gateway, spec

ARGUMENTS = '{"city": "Köln", "days": [1, 2], "note": "a\\"b"}'
SERVERS = ("in process", "uvicorn")


def api_gateway(folder: Path, **options: Any) -> Gateway:
    """Experts for every kind of answer; ``auto`` goes to echo, ``coe/casc`` is a cascade."""
    both = spec("echo").capabilities | {Capability.IMAGES}
    experts = [
        spec("echo", capabilities=both),
        spec("tokens", "tokens?count=5"),
        spec("caller", "tool_calls", options={"arguments": ARGUMENTS}),
        spec("thinker", "fixed?text=forty two&reasoning=let me see"),
        spec("draft", "fixed?text=a weak draft of five&confidence=0.3"),
        spec("final", "fixed?text=the strong final answer"),
        spec("broken", "fail?status=500"),
        spec("cut", "disconnect?after=2"),
        spec("late"),
        spec("late-broken"),
    ]
    policies = {"auto": PLAIN_POLICY, "casc": CASCADE_POLICY}
    return make_gateway(folder, experts, policies=policies, **options)


class Patience:
    """Experts that make ready until their caller has been told twice to wait, however long a
    machine takes over either. The application of a gateway with ``late`` and ``late-broken``.
    """

    def __init__(self, folder: Path) -> None:
        self._told = 0
        self._enough = asyncio.Event()
        scripts = {
            "late": "fixed?text=done&delay_ms=1",
            "late-broken": "disconnect?after=0&delay_ms=1",
        }
        gateway = api_gateway(
            folder,
            http_limits=HttpLimits(keep_alive=KeepAlive(20, 20)),
            backends={
                name: ScriptedBackend(Script.parse(script), sleep=self._make_ready)
                for name, script in scripts.items()
            },
        )
        self._app = gateway.app

    async def _make_ready(self, _: float) -> None:
        async with asyncio.timeout(30):
            await self._enough.wait()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request at a time."""
        self._told = 0
        self._enough.clear()

        async def counting(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.body":
                self._told += 1
                if self._told == 2:
                    self._enough.set()

        await self._app(scope, receive, counting)


@asynccontextmanager
async def anthropic_client(base_url: str, app: Any | None = None) -> AsyncIterator[AsyncAnthropic]:
    """The official client, strict; with ``app`` it calls in process."""
    transport = httpx2.ASGITransport(app=app) if app is not None else None
    async with (
        httpx2.AsyncClient(transport=transport) as http,
        AsyncAnthropic(
            base_url=base_url,
            api_key="test",
            max_retries=0,
            http_client=http,
            _strict_response_validation=True,
        ) as client,
    ):
        yield client


async def raw_post(
    url: str, path: str, body: dict[str, Any], **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    async with (
        aiohttp.ClientSession() as http,
        http.post(
            f"{url}{path}", data=io.BytesIO(msgspec.json.encode(body)), headers=headers
        ) as answer,
    ):
        named = {name.lower(): value for name, value in answer.headers.items()}
        return answer.status, await answer.read(), named


def events_of(raw: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Named events of a stream; fails on anything that is not framed as one."""
    found: list[tuple[str, dict[str, Any]]] = []
    assert raw.endswith(b"\n\n")
    for block in raw[:-2].split(b"\n\n"):
        if block.startswith(b":"):
            continue
        name, data = block.split(b"\n")
        assert name.startswith(b"event: ")
        assert data.startswith(b"data: ")
        found.append((name[7:].decode(), msgspec.json.decode(data[6:])))
    return found
