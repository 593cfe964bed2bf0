"""Asking the running gateway, and what came back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from bench.composition.questions import Question

AUTO = "auto"
TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Reply:
    """One answer: who gave it and why, what it cost (micro-dollars), whether it is right."""

    question: Question
    model: str
    text: str
    right: bool
    expert: str
    category: str
    cost_micro_usd: int
    swap_ms: float


async def ask_all(
    base_url: str,
    model: str,
    questions: Sequence[Question],
    *,
    concurrency: int,
    done: Callable[[], None],
) -> list[Reply]:
    """Every question to ``model`` of the gateway at ``base_url`` (which ends in ``/v1``), in order.

    Greedy decoding. Raises ``httpx.HTTPError`` for an answer that is none: a benchmark that skips
    failures would measure another set.
    """
    room = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(timeout=TIMEOUT_S, limits=limits) as client:

        async def one(question: Question) -> Reply:
            async with room:
                reply = await _ask(client, base_url, model, question)
            done()
            return reply

        return list(await asyncio.gather(*(one(q) for q in questions)))


async def _ask(client: httpx.AsyncClient, base_url: str, model: str, question: Question) -> Reply:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question.prompt}],
        "max_tokens": question.max_tokens,
        "temperature": 0,
    }
    response = await client.post(f"{base_url}/chat/completions", json=body)
    response.raise_for_status()
    text = response.json()["choices"][0]["message"]["content"] or ""
    headers = response.headers
    return Reply(
        question=question,
        model=model,
        text=text,
        right=question.right(text),
        expert=headers["x-coe-expert"],
        category=headers.get("x-coe-category", ""),
        cost_micro_usd=round(float(headers["x-coe-cost-usd"]) * 1e6),
        swap_ms=float(headers["x-coe-swap-ms"]),
    )


async def experts_of(base_url: str) -> list[str]:
    """The ids under ``/v1/models`` that are experts, not policies."""
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        response = await client.get(f"{base_url}/models")
    response.raise_for_status()
    names = [model["id"] for model in response.json()["data"]]
    return [name for name in names if name != AUTO and not name.startswith("coe/")]
