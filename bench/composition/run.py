"""Does the composition beat its parts? Asked of the running gateway, with real engines.

A mixed held-out set goes to ``model: auto`` and to every single expert; the paraphrases go to
``auto``, to the generalist, and each to its own specialist. Without ``--base-url`` the quickstart
is started for the run.

    python bench/composition.py [--json FILE] [--plot FILE.svg] [--answers FILE.jsonl]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import _report
from bench.composition.ask import AUTO, Reply, ask_all, experts_of
from bench.composition.plot import accuracy_svg
from bench.composition.questions import (
    GENERAL,
    SPECIALISTS,
    Question,
    heldout_mix,
    paraphrases,
)
from bench.composition.report import show
from bench.composition.score import summary
from bench.composition.stack import QUICKSTART, served

Replies = dict[str, Sequence[Reply]]


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", help="result file; - for standard output")
    parser.add_argument("--plot", type=Path, help="SVG file (default: beside --json)")
    parser.add_argument("--answers", type=Path, help="every answer and verdict, as JSON Lines")
    parser.add_argument("--base-url", help="a running gateway, such as http://127.0.0.1:8000/v1")
    parser.add_argument(
        "--config", type=Path, default=QUICKSTART, help="what to serve if none runs"
    )
    parser.add_argument("--per-task", type=int, default=40)
    parser.add_argument("--concurrency", type=int, default=48)
    parser.add_argument("--seed", type=int, default=20)
    return parser.parse_args(argv)


class _Asker:
    """Asks one model after the other, so that single experts need no swap in between."""

    def __init__(self, base_url: str, concurrency: int, console: Console) -> None:
        self._base_url, self._concurrency, self._console = base_url, concurrency, console

    async def __call__(self, model: str, questions: Sequence[Question], what: str) -> list[Reply]:
        with Progress(
            TextColumn("{task.description:32}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        ) as bar:
            job = bar.add_task(f"{what} to {model}", total=len(questions))
            replies = await ask_all(
                self._base_url,
                model,
                questions,
                concurrency=self._concurrency,
                done=lambda: bar.advance(job),
            )
        right = sum(r.right for r in replies)
        self._console.print(f"{what} to {model}: {right} of {len(replies)} right")
        return replies


async def measure(
    base_url: str, per_task: int, concurrency: int, seed: int, console: Console
) -> tuple[dict[str, Any], list[Reply]]:
    """(what is reported, every reply) of a run against the gateway at ``base_url``."""
    mix, hand = heldout_mix(per_task, seed), paraphrases()
    experts = await experts_of(base_url)
    missing = {GENERAL, *SPECIALISTS} - set(experts)
    if missing:
        raise SystemExit(f"the gateway at {base_url} does not serve {', '.join(sorted(missing))}")
    asked, started = _Asker(base_url, concurrency, console), time.monotonic()
    mixed: Replies = {AUTO: await asked(AUTO, mix, "held-out questions")}
    by_hand: Replies = {AUTO: await asked(AUTO, hand, "paraphrases")}
    for expert in experts:
        mixed[expert] = await asked(expert, mix, "held-out questions")
        own = [q for q in hand if q.checkable and expert in (GENERAL, q.task)]
        if own:
            by_hand[expert] = await asked(expert, own, "paraphrases")
    result = summary(mixed, by_hand, AUTO, seed)
    result["elapsed_s"] = round(time.monotonic() - started, 1)
    result["seed"] = seed
    return result, [r for group in (mixed, by_hand) for rs in group.values() for r in rs]


def _write_answers(path: Path, replies: list[Reply]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for r in replies:
            row = {
                "id": r.question.id,
                "task": r.question.task,
                "model": r.model,
                "expert": r.expert,
                "category": r.category,
                "right": r.right,
                "prompt": r.question.prompt,
                "answer": r.text,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Command line; status 0 when the run is complete, whatever it found."""
    options, console = _options(argv), Console(stderr=True)
    console.print(
        "starting the quickstart" if not options.base_url else "using the running gateway"
    )
    gateway = nullcontext(options.base_url) if options.base_url else served(options.config)
    with gateway as base_url:
        result, replies = asyncio.run(
            measure(base_url, options.per_task, options.concurrency, options.seed, console)
        )
    show(result, console)
    plot = options.plot
    if plot is None and options.json and options.json != "-":
        plot = Path(options.json).with_suffix(".svg")
    if plot is not None:
        plot.write_text(accuracy_svg(result, AUTO), encoding="utf-8")
        console.print(f"wrote {plot}")
    if options.answers is not None:
        _write_answers(options.answers, replies)
    _report.write(result, options.json)
    return 0
