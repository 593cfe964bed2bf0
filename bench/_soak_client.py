"""The soak test's clients: a mix of requests, each noted as its client saw it."""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from dataclasses import dataclass
from typing import Any

import aiohttp

from bench._soak_ledger import Seen

PATH = "/v1/chat/completions"
PATIENCE_S = 25.0  # beyond any deadline here: whoever still waits has been forgotten
_MIX = {
    "whole": 30,
    "stream": 25,
    "named": 8,
    "cascade": 10,
    "cascade stream": 10,
    "cancelled": 5,
    "cancelled stream": 5,
    "bad body": 4,
    "bad key": 1,
    "poor key": 2,
}
_BAD_BODIES = (
    b"{",
    b'{"model": "auto"}',
    b'{"model": "nobody", "messages": [{"role": "user", "content": "x"}]}',
    b'{"model": "auto", "messages": [{"role": "user", "content": "x"}], "max_tokens": "many"}',
)


@dataclass(frozen=True, slots=True)
class Keys:
    """Secrets. ``poor`` has a budget that is soon spent."""

    rich: tuple[str, ...]
    poor: str
    invalid: str


async def client(
    http: aiohttp.ClientSession,
    url: str,
    keys: Keys,
    dice: random.Random,
    until_s: float,
    pause_s: float,
    seen: list[Seen],
) -> None:
    """One caller who asks until the time is over."""
    while time.monotonic() < until_s:
        kind = dice.choices(list(_MIX), list(_MIX.values()))[0]
        key = {"bad key": keys.invalid, "poor key": keys.poor}.get(kind, dice.choice(keys.rich))
        one = Seen(f"soak-{uuid.uuid4().hex}", key, kind, time.monotonic())
        seen.append(one)
        try:
            async with asyncio.timeout(PATIENCE_S):
                await _ask(http, url, one, dice)
        except TimeoutError:
            one.outcome = "hung"
        except (aiohttp.ClientError, OSError):
            one.outcome = "broken"
        one.ended_s = time.monotonic()
        await asyncio.sleep(dice.random() * 2 * pause_s)


async def _ask(http: aiohttp.ClientSession, url: str, one: Seen, dice: random.Random) -> None:
    stream = "stream" in one.kind
    body = _body(one.kind, stream, dice)
    leave_after = dice.randrange(1, 5) if one.kind == "cancelled stream" else None
    patience_s = dice.uniform(0.001, 0.03) if one.kind == "cancelled" else None
    headers = {"authorization": f"Bearer {one.key}", "x-request-id": one.request}
    try:
        async with (
            asyncio.timeout(patience_s),
            http.post(url + PATH, data=body, headers=headers) as answer,
        ):
            one.status = answer.status
            if stream and answer.status == 200:
                await _follow(answer, one, leave_after)
            else:
                _read_whole(await answer.read(), one)
    except TimeoutError:
        if patience_s is None:
            raise
        one.outcome = "cancelled"


def _body(kind: str, stream: bool, dice: random.Random) -> bytes:
    if kind == "bad body":
        return dice.choice(_BAD_BODIES)
    model = "coe/casc" if "cascade" in kind else "flaky" if kind == "named" else "auto"
    text = f"Question {dice.randrange(40)}: how many legs have spiders?"
    return json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": 16,
            "stream": stream,
        }
    ).encode()


def _read_whole(raw: bytes, one: Seen) -> None:
    reply = json.loads(raw)
    if one.status == 200:
        one.outcome, one.cost_micro_usd = "ok", _micro_usd(reply["coe"])
    else:
        one.outcome, one.code = "error", f"{one.status} {reply['error']['code']}"


async def _follow(answer: aiohttp.ClientResponse, one: Seen, leave_after: int | None) -> None:
    chunks, coe = 0, None
    async for line in answer.content:
        if not line.startswith(b"data: "):
            continue
        payload = line[6:].strip()
        if payload == b"[DONE]":
            if coe is None:
                raise RuntimeError(f"{one.request}: a stream without its cost")
            one.outcome, one.cost_micro_usd = "ok", _micro_usd(coe)
            return
        event: dict[str, Any] = json.loads(payload)
        if error := event.get("error"):
            one.outcome, one.code = "error", f"in band {error['code']}"
            return
        chunks += 1
        if "cost_usd" in event.get("coe", {}):
            coe = event["coe"]
        if chunks == leave_after:
            one.outcome = "cancelled"
            answer.close()
            return
    one.outcome = "cut"


def _micro_usd(coe: dict[str, Any]) -> int:
    return round(float(coe["cost_usd"]) * 1e6)
