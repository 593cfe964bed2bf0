"""Limits shared by four gateway processes that are asked for five times as much, all at once."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from deployments.store import StateStore
from gateway.keys import KeyBudgets, KeyLimits, KeyScope, digest_of, key_secret
from gateway.state.keys import KeyLedger, KeyStore, KeyUsage
from tests.contract.key_hammer import MAX_TOKENS, OUTPUT_TOKENS, PROMPT

pytestmark = pytest.mark.valkey

ROOT = Path(__file__).parents[2]
PROCESSES, REQUESTS = 4, 125
MICRO_USD_PER_TOKEN = 2
LIMIT = 100 * MAX_TOKENS * MICRO_USD_PER_TOKEN
PER_MINUTE = 10  # refilled slowly enough that a round sees one minute's worth and no more


@dataclass(frozen=True)
class Seen:
    """What all processes together got in one round."""

    served: int
    refused: dict[str, int]
    spent: int
    tokens: int
    seconds: float


@contextmanager
def hammers(url: str, namespace: str) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes, ready for their first round."""
    environment = {**os.environ, "HAMMER_STORE": url, "HAMMER_NAMESPACE": namespace}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.contract.key_hammer", str(REQUESTS)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(PROCESSES)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield running
        for process in running:
            assert process.stdin is not None
            process.stdin.close()
        assert [process.wait(timeout=30) for process in running] == [0] * PROCESSES
    finally:
        for process in running:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def one_round(running: list[subprocess.Popen[str]], expert: str, secret: str) -> Seen:
    """Let all of them go together."""
    began_s = time.monotonic()
    for process in running:
        assert process.stdin is not None
        process.stdin.write(f"{expert} {secret}\n")
        process.stdin.flush()
    seen = [json.loads(process.stdout.readline()) for process in running if process.stdout]
    statuses: dict[str, int] = {}
    for one in seen:
        for status, count in one["statuses"].items():
            statuses[status] = statuses.get(status, 0) + count
    served = statuses.pop("200", 0)
    spent, tokens = (sum(one[name] for one in seen) for name in ("spent", "tokens"))
    return Seen(served, statuses, spent, tokens, time.monotonic() - began_s)


async def test_pain_03_no_limit_is_exceeded_by_four_gateways_at_once(
    stand_alone_url: str, namespace: str
) -> None:
    """Five hundred requests against each: a budget, a number of requests, a number of tokens."""
    store = StateStore(stand_alone_url, timeout_ms=5_000, namespace=namespace)

    async def new_key(limits: KeyLimits, budgets: KeyBudgets) -> str:
        secret = key_secret(secrets.token_bytes(32))
        await KeyStore(store).create(digest_of(secret), "shared", KeyScope(), limits, budgets)
        return secret

    async def usage_of(secret: str) -> KeyUsage:
        return await KeyLedger(store).usage(digest_of(secret))

    with hammers(stand_alone_url, namespace) as running:
        for expert, output_tokens in OUTPUT_TOKENS.items():
            secret = await new_key(KeyLimits(), KeyBudgets(total=LIMIT))
            seen = one_round(running, expert, secret)
            check_budget(seen, await usage_of(secret), output_tokens)
        secret = await new_key(KeyLimits(requests_per_minute=PER_MINUTE), KeyBudgets())
        seen = one_round(running, "echo", secret)
        check_rate(seen, PER_MINUTE)
        each = len(PROMPT.split()) + MAX_TOKENS
        limits = KeyLimits(tokens_per_minute=PER_MINUTE * each)
        seen = one_round(running, "echo", await new_key(limits, KeyBudgets()))
        check_rate(seen, PER_MINUTE)
        assert seen.tokens == seen.served * each, "nothing was given back or owed"
    for key in await store.command("KEYS", store.key("*")):
        await store.command("DEL", key)
    await store.aclose()


def check_budget(seen: Seen, usage: KeyUsage, output_tokens: int) -> None:
    """With every request at its worst case exactly a hundred fit; with cheaper ones more may."""
    assert seen.served + seen.refused["402"] == PROCESSES * REQUESTS
    assert usage.total == seen.served * output_tokens * MICRO_USD_PER_TOKEN == seen.spent
    assert usage.total <= LIMIT
    assert (usage.reserved, usage.running) == (0, 0)
    if output_tokens == MAX_TOKENS:
        assert seen.served == 100
    else:
        assert 100 <= seen.served < PROCESSES * REQUESTS


def check_rate(seen: Seen, per_minute: int) -> None:
    """One minute's worth, and what came in since: within six seconds not a single one."""
    assert seen.served + seen.refused["429"] == PROCESSES * REQUESTS
    assert per_minute <= seen.served <= per_minute * (1 + seen.seconds / 60)
