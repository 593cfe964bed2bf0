"""The shipped prompts, held-out prompts and artifact belong together and keep their promise."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from importlib import resources
from pathlib import Path

from routers.dataset import read_prompts
from routers.metrics import measured
from routers.router import SemanticRouter
from routers.text import routing_text
from routers.types import GENERAL

DATA = Path(str(resources.files("routers"))) / "data" / "quickstart"
CATEGORIES = {"sql", "json", "math", "convert", GENERAL}


def heldout() -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / "heldout.jsonl").read_text().splitlines()]


def test_prompts_are_enough_and_half_are_written_by_hand() -> None:
    prompts = read_prompts(DATA / "prompts.jsonl")
    counts = Counter(prompts.categories)
    assert set(counts) == CATEGORIES
    assert min(counts.values()) >= 120
    by_hand = [group for group in prompts.groups if group.startswith("row:")]
    assert len(by_hand) >= len(prompts.texts) / 2


def test_heldout_prompts_are_no_training_prompts() -> None:
    training = set(read_prompts(DATA / "prompts.jsonl").texts)
    rows = heldout()
    assert not training & {routing_text(row["prompt"]) for row in rows}
    counts = Counter(row["category"] for row in rows)
    assert set(counts) == CATEGORIES
    assert min(counts.values()) >= 25


async def test_nine_of_ten_heldout_prompts_are_routed_right() -> None:
    rows = heldout()
    router = SemanticRouter.load(DATA / "artifact")
    answers = await asyncio.gather(*[router.classify(row["prompt"]) for row in rows])
    await router.aclose()
    metrics = measured(answers, [row["category"] for row in rows])
    assert metrics.accuracy >= 0.90
    assert min(metrics.recall.values()) >= 0.80
    assert metrics.recall[GENERAL] >= 0.95
    assert metrics.ece <= 0.10


async def test_gibberish_and_other_languages_are_general() -> None:
    router = SemanticRouter.load(DATA / "artifact")
    texts = ["xkcd qwop zzyzx brrr", "", "Kuinka vanha Helsinki on?", "\u200b", "🦆🦆🦆"]
    answers = await asyncio.gather(*[router.classify(text) for text in texts])
    await router.aclose()
    assert [a.category for a in answers] == [GENERAL] * len(texts)
