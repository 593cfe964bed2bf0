"""Two hosts, two real engines, four experts, memory for two on each: placement while both serve."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.integration.stack import ROOT, Stack, launch, wait_ready, write_config
from tests.integration.tiny_models import write_tiny_llama

pytestmark = [
    pytest.mark.engine,
    pytest.mark.ray,
    pytest.mark.valkey,
    pytest.mark.timeout(600),
]

EXPERTS = ("a", "b", "c", "d")
SETTLED_S = 90.0


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("placement")
    models = {
        name: write_tiny_llama(folder / name, seed=seed, tied=True)
        for seed, name in enumerate(EXPERTS)
    }
    weights_bytes = (models["a"] / "model.safetensors").stat().st_size
    (folder / "policies").mkdir()
    (folder / "policies" / "auto.yaml").write_text("version: 1\ndefault: a\ncaps: {cost_usd: 1}\n")
    config = write_config(
        folder,
        experts={name: _expert(path) for name, path in models.items()},
        hosts=[
            _host("one", EXPERTS, int(2.5 * weights_bytes)),
            _host("two", EXPERTS[::-1], int(2.5 * weights_bytes)),
        ],
        placement={"mode": "auto", "half_life_s": 2, "pause_s": 1},
        policies={"dir": "policies"},
        router={"artifact": None},
    )
    running = launch(config, folder)
    try:
        yield wait_ready(running)
    finally:
        if running.process.poll() is None:
            running.stop(signal.SIGTERM)


def _expert(path: Path) -> dict[str, Any]:
    return {
        "source": {"path": str(path)},
        "price": {"input_usd_per_mtok": 0, "output_usd_per_mtok": 0},
        "context_tokens": 512,
    }


def _host(name: str, experts: Sequence[str], pool_bytes: int) -> dict[str, Any]:
    """The first two experts are those that it holds at its start."""
    return {
        "name": name,
        "experts": list(experts),
        "engine": {
            "dtype": "float32",  # as on disk, so that the file tells what an entry takes
            "max_model_len": 512,
            "kv_cache_bytes": "64MiB",
            "max_num_seqs": 8,
        },
        "pool": {"host_memory_bytes": pool_bytes},
    }


def cluster(stack: Stack) -> dict[str, Any]:
    """What ``coe status`` says."""
    address = ("--config", stack.config, "--url", stack.url.removesuffix("/v1"))
    ran = subprocess.run(
        [sys.executable, "-m", "gateway.cli", "status", "--json", "-", *address],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "XDG_STATE_HOME": str(stack.config.parent / "state")},
    )
    found: dict[str, Any] = json.loads(ran.stdout)
    return found


def ask(client: openai.OpenAI, expert: str) -> str:
    answer = client.chat.completions.create(
        model=expert,
        messages=[{"role": "user", "content": "tell me"}],
        max_tokens=12,
        temperature=0,
    )
    assert answer.model == expert
    return answer.choices[0].message.content or ""


def until_a_is_everywhere(stack: Stack, client: openai.OpenAI) -> dict[str, Any]:
    """Two callers at a time ask for ``a``: too few to send a host after weights by itself."""
    deadline, said = time.monotonic() + SETTLED_S, set()
    with ThreadPoolExecutor(2) as callers:
        while time.monotonic() < deadline:
            said.update(callers.map(lambda _: ask(client, "a"), range(8)))
            assert len(said) == 1, f"a changed its answer while weights moved beside it: {said}"
            seen = cluster(stack)
            if all("a" in host["pooled"] for host in seen["hosts"]):
                return seen
    raise AssertionError(f"a was given no second place: {seen}\n{stack.text()}")


def test_hosts_are_told_what_to_hold_while_they_serve(stack: Stack) -> None:
    with openai.OpenAI(base_url=stack.url, api_key="unused", max_retries=0) as client:
        held = [set(host["pooled"]) for host in cluster(stack)["hosts"]]
        assert sorted(map(sorted, held)) == [["a", "b"], ["c", "d"]]
        seen = until_a_is_everywhere(stack, client)
        said = {name: ask(client, name) for name in EXPERTS}
    assert len(set(said.values())) == len(EXPERTS), "weights that can be told apart"
    assert all(host["pooled_bytes"] <= host["pool_bytes"] for host in seen["hosts"])
    done = sorted((m for m in seen["moves"] if m["outcome"] == "done"), key=lambda m: m["ended_ms"])
    kinds = [(move["kind"], move["expert"]) for move in done]
    assert kinds in ([("evict", "c"), ("pool", "a")], [("evict", "d"), ("pool", "a")])
    for earlier, later in pairwise(done):
        began_ms = later["ended_ms"] - later["took_ms"]
        assert earlier["ended_ms"] <= began_ms + 1, "one at a time"
