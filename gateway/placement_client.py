"""Tells hosts to take an expert's weights in, or to let go of them, over their own ports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from deployments.host_placement import PLACEMENT_PATH
from deployments.placement import Move
from deployments.placement_planner import MoveOutcome
from deployments.swap.loading import COMMAND_MS_MAX

__all__ = ["HostCommands", "MoveAnswer"]

_CONNECT_S = 3.0
_TOTAL_S = COMMAND_MS_MAX / 1000 + 10.0  # the host answers within its own bound
_ANSWER_BYTES_MAX = 64 * 1024
_REASON_CHARS_MAX = 300


@dataclass(frozen=True, slots=True)
class MoveAnswer:
    """``reason`` is empty when it is done."""

    outcome: MoveOutcome
    reason: str = ""


class HostCommands:
    """``token``: the secret that hosts and gateways share; None: there is none."""

    def __init__(self, *, token: Callable[[], str | None]) -> None:
        self._token = token
        self._session: aiohttp.ClientSession | None = None

    async def move(self, url: str, move: Move) -> MoveAnswer:
        """Have the host at ``url`` make the move; returns within a bounded time, whatever happens
        there. Never raises for what a host or the network does."""
        body = msgspec.json.encode({"kind": move.kind.value, "expert": move.expert})
        headers = {"content-type": "application/json"}
        if token := self._token():
            headers["authorization"] = f"Bearer {token}"
        try:
            async with self._opened().post(
                url + PLACEMENT_PATH, data=body, headers=headers, allow_redirects=False
            ) as reply:
                raw = await reply.content.read(_ANSWER_BYTES_MAX)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return MoveAnswer(MoveOutcome.FAILED, f"{type(error).__name__}: {error}")
        if reply.status == 200:
            return MoveAnswer(MoveOutcome.DONE)
        outcome = MoveOutcome.REFUSED if reply.status == 409 else MoveOutcome.FAILED
        return MoveAnswer(outcome, _reason(reply.status, raw))

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(total=_TOTAL_S, sock_connect=_CONNECT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()


def _reason(status: int, raw: bytes) -> str:
    try:
        body: Any = msgspec.json.decode(raw)
        message = str(body["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return f"HTTP {status}"
    return message[:_REASON_CHARS_MAX]
