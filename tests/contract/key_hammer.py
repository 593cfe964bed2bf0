"""One gateway process of ``test_keys_over_processes``: asks at once, prints what it got as JSON.

    python -m tests.contract.key_hammer REQUESTS   (store by environment)

One round for each line on standard input, ``EXPERT SECRET``, until there are no more: ``echo``
costs what it may cost at most, ``short`` less.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import openai

from deployments.store import StateStore
from experts.types import Price
from gateway.access import AccessControl
from gateway.state.keys import KeyLedger, KeyStore
from gateway.tokens import estimate_tokens
from tests.contract.gateway_kit import Gateway, make_gateway, openai_client, spec

MAX_TOKENS = 8
OUTPUT_TOKENS = {"echo": MAX_TOKENS, "short": 3}


def exact_prompt() -> str:
    """A prompt of as many words, the scripted experts' tokens, as the gateway estimates."""
    texts = (" ".join("a" * words) for words in range(1, 1_000))
    return next(text for text in texts if estimate_tokens([text], messages=1) == text.count("a"))


PROMPT = exact_prompt()


async def main(requests: int) -> None:
    store = StateStore(
        os.environ["HAMMER_STORE"], timeout_ms=30_000, namespace=os.environ["HAMMER_NAMESPACE"]
    )
    gate = AccessControl(
        KeyStore(store), KeyLedger(store), require_keys=True, request_timeout_ms=60_000
    )
    experts = [
        spec(name, f"tokens?count={count}&delay_ms=20", price=Price(0, 2_000_000))
        for name, count in OUTPUT_TOKENS.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        gateway = make_gateway(Path(folder), experts, gate=gate, new_id=lambda: uuid.uuid4().hex)
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await _round(gateway, requests, *line.split())), flush=True)
    await gate.aclose()
    await store.aclose()


async def _round(gateway: Gateway, requests: int, expert: str, secret: str) -> dict[str, Any]:
    gateway.records.clear()
    async with openai_client("http://gateway", gateway.app, api_key=secret) as client:
        asked = (_ask(client, expert, stream=n % 2 == 0) for n in range(requests))
        statuses = Counter(await asyncio.gather(*asked))
    served = [record for record in gateway.records if record["outcome"] == "ok"]
    spent = sum(record["cost_micro_usd"] for record in gateway.records)
    tokens = sum(record["input_tokens"] + record["output_tokens"] for record in served)
    return {"statuses": statuses, "spent": spent, "tokens": tokens}


async def _ask(client: openai.AsyncOpenAI, expert: str, *, stream: bool) -> int:
    try:
        answer = await client.chat.completions.create(
            model=expert,
            messages=[{"role": "user", "content": PROMPT}],
            max_tokens=MAX_TOKENS,
            stream=stream,
        )
        if isinstance(answer, openai.AsyncStream):
            async for _ in answer:
                pass
    except openai.APIStatusError as error:
        return error.status_code
    return 200


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1])))
