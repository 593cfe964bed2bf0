"""A budget shared by four gateway processes that are asked for five times as much, all at once."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from deployments.store import StateStore
from gateway.keys import KeyBudgets, KeyLimits, KeyScope, digest_of, key_secret
from gateway.state.keys import KeyLedger, KeyStore
from tests.contract.key_hammer import MAX_TOKENS, OUTPUT_TOKENS

pytestmark = pytest.mark.valkey

ROOT = Path(__file__).parents[2]
PROCESSES, REQUESTS = 4, 125
MICRO_USD_PER_TOKEN = 2
LIMIT = 100 * MAX_TOKENS * MICRO_USD_PER_TOKEN


@contextmanager
def hammers(url: str, namespace: str, keys: list[str]) -> Iterator[list[subprocess.Popen[str]]]:
    """The processes, ready for their first round."""
    environment = {
        **os.environ,
        "HAMMER_STORE": url,
        "HAMMER_NAMESPACE": namespace,
        "HAMMER_SECRETS": " ".join(keys),
    }
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
        yield running
        assert [process.wait(timeout=30) for process in running] == [0] * PROCESSES
    finally:
        for process in running:
            process.kill()
            process.communicate()


def one_round(running: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """Let all of them go together; what each saw."""
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return [json.loads(process.stdout.readline()) for process in running if process.stdout]


async def test_five_hundred_requests_against_a_budget_for_a_hundred(
    stand_alone_url: str, namespace: str
) -> None:
    """With every request at its worst case exactly a hundred fit; with cheaper ones more may."""
    store = StateStore(stand_alone_url, timeout_ms=5_000, namespace=namespace)
    keys = [key_secret(secrets.token_bytes(32)) for _ in OUTPUT_TOKENS]
    for secret in keys:
        await KeyStore(store).create(
            digest_of(secret), "shared", KeyScope(), KeyLimits(), KeyBudgets(day=LIMIT)
        )
    with hammers(stand_alone_url, namespace, keys) as running:
        for secret, output_tokens in zip(keys, OUTPUT_TOKENS.values(), strict=True):
            seen = one_round(running)
            served = sum(one["statuses"].get("200", 0) for one in seen)
            refused = sum(one["statuses"].get("402", 0) for one in seen)
            usage = await KeyLedger(store).usage(digest_of(secret))
            charged = served * output_tokens * MICRO_USD_PER_TOKEN
            assert served + refused == PROCESSES * REQUESTS
            assert usage.day == charged == sum(one["spent"] for one in seen)
            assert usage.day <= LIMIT
            assert (usage.reserved, usage.running) == (0, 0)
            if output_tokens == MAX_TOKENS:
                assert served == 100
            else:
                assert 100 <= served < PROCESSES * REQUESTS
    for key in await store.command("KEYS", store.key("*")):
        await store.command("DEL", key)
    await store.aclose()
