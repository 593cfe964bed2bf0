"""Whether a gateway worker's memory stays flat: its resident set after 20,000 and 200,000 requests.

One real worker (``gateway.worker``) with its state store, router, decision log, session memory and
breakers; scripted experts inside it, so that it is the gateway that is measured. Whole answers,
streams, refused bodies and abandoned streams, each with a session id of its own. The first figure
is taken when every bounded table is full.

    python bench/memory.py [--json FILE] [--requests 200000] [--first 20000]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import aiohttp  # noqa: E402 - the project root has to be importable first

from bench import _report, soak  # noqa: E402
from deployments.embedded_valkey import EmbeddedValkey  # noqa: E402

CALLERS = 32
PROMPTS = 200
SETTLE_S = 2.0
CONFIG = """
experts:
  first:
    source: {scripted: "fixed?text=a short answer of six words"}
    price: {input_usd_per_mtok: 1, output_usd_per_mtok: 2}
    context_tokens: 8192
  second:
    source: {scripted: "tokens?count=6"}
    price: {input_usd_per_mtok: 1, output_usd_per_mtok: 2}
    context_tokens: 8192
policies: {dir: policies, default: auto}
"""
POLICY = """
version: 1
routes: {sql: second}
default: first
fallbacks: [second]
caps: {stages: 2, cost_usd: 0.01, deadline_ms: 60000}
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", help="result file; - for standard output")
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--first", type=int, default=20_000)
    options = parser.parse_args()
    result = asyncio.run(_measure(options.first, options.requests))
    for name, value in result.items():
        print(f"{name:>28}  {value}", file=sys.stderr)
    _report.write(result, options.json)
    return 0


async def _measure(first: int, total: int) -> dict[str, Any]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        valkey = stack.enter_context(EmbeddedValkey())
        workers = stack.enter_context(soak.Workers(_written(folder), valkey.url, count=1))
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=4)
        async with aiohttp.ClientSession(connector=connector) as http:
            await soak.ready(http, workers.url)
            at_start = workers.resident_mib()[0]
            began = time.perf_counter()
            course: dict[int, float] = {}
            for until in (*range(first, total, first), total):
                course[until] = await _load(http, workers, max(course, default=0), until)
                print(f"after {until} requests: {course[until]} MiB", file=sys.stderr)
            seconds = time.perf_counter() - began
    after_first, after_all = course[first], course[total]
    return {
        "resident_mib_at_start": at_start,
        "requests_first": first,
        "resident_mib_after_first": after_first,
        "requests_all": total,
        "resident_mib_after_all": after_all,
        "resident_mib_by_requests": {str(count): mib for count, mib in course.items()},
        "memory_ratio": round(after_all / after_first, 4),
        "requests_per_s": round(total / seconds, 1),
    }


async def _load(
    http: aiohttp.ClientSession, workers: soak.Workers, begin: int, until: int
) -> float:
    """Make the requests from ``begin`` to ``until``; the worker's resident set then, in MiB."""
    numbers = iter(range(begin, until))

    async def caller() -> None:
        for number in numbers:
            await _ask(http, workers.url, number)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    await asyncio.sleep(SETTLE_S)
    return workers.resident_mib()[0]


async def _ask(http: aiohttp.ClientSession, url: str, number: int) -> None:
    kind = number % 10
    stream = kind in (3, 6, 9)
    body: dict[str, Any] = {
        "model": "first" if kind == 1 else "auto",
        "messages": [{"role": "user", "content": f"Question {number % PROMPTS}: how many legs?"}],
        "max_tokens": "many" if kind == 8 else 16,
        "stream": stream,
        "coe": {"session_id": f"session {number}"},
    }
    async with http.post(f"{url}/v1/chat/completions", data=json.dumps(body)) as answer:
        if answer.status != (400 if kind == 8 else 200):
            raise RuntimeError(f"{answer.status}: {(await answer.read())[:300]!r}")
        if kind == 9:
            await answer.content.readany()
            answer.close()
        else:
            await answer.read()


def _written(folder: Path) -> Path:
    (folder / "policies").mkdir()
    (folder / "policies" / "auto.yaml").write_text(POLICY)
    config = folder / "coe.yaml"
    config.write_text(CONFIG)
    return config


if __name__ == "__main__":
    sys.exit(main())
