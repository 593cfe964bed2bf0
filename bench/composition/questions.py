"""The questions: held-out ones that the tasks generate, general ones, and paraphrases by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from bench.composition.verify_json import json_is
from bench.composition.verify_measure import states
from bench.composition.verify_number import number_is
from bench.composition.verify_sql import open_database, sql_is
from bench.composition.verify_words import mentions
from examples.quickstart.tasks import TASKS

DATA = Path(__file__).with_name("data")
GENERAL = "general"
GENERAL_MAX_TOKENS = 40
HELDOUT, PARAPHRASE = "heldout", "paraphrase"
SPECIALISTS = tuple(TASKS)
CATEGORIES = (*SPECIALISTS, GENERAL)


@dataclass(frozen=True)
class Question:
    """``id`` is unique; ``task`` is the category; ``right`` judges an answer's text.

    A question that has no single right answer is not ``checkable``: it tests the routing only.
    """

    id: str
    task: str
    source: str
    prompt: str
    max_tokens: int
    right: Callable[[str], bool]
    checkable: bool = True


def _sql_right(row: dict[str, Any]) -> Callable[[str], bool]:
    def right(output: str) -> bool:
        with closing(open_database(row["setup"])) as db:
            return sql_is(output, row["query"], [db], ordered=row["ordered"])

    return right


def _by_hand_right(row: dict[str, Any]) -> Callable[[str], bool]:
    """The judge of one line of a data file."""
    task = row["task"]
    if task == "sql":
        return _sql_right(row)
    if task == "json":
        return lambda output: json_is(output, row["answer"])
    if task == "math":
        return lambda output: number_is(output, row["answer"])
    if task == "convert":
        return lambda output: states(output, [row["answer"], *row.get("accept", ())])
    return lambda output: mentions(output, row.get("accept", []))


def _max_tokens(task: str) -> int:
    return TASKS[task].max_new_tokens if task in TASKS else GENERAL_MAX_TOKENS


def by_hand(path: Path, source: str) -> list[Question]:
    """The questions of one JSON Lines file."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if not line.strip():
            continue
        row = json.loads(line)
        task = row["task"]
        found.append(
            Question(
                f"{source}-{task}-{number}",
                task,
                source,
                row["prompt"],
                _max_tokens(task),
                _by_hand_right(row),
                checkable=task != GENERAL or "accept" in row,
            )
        )
    return found


def generated(task: str, count: int, seed: int) -> list[Question]:
    """Questions of the task's held-out split, not those of its adapter's card."""
    rng = Random(f"{task}-composition-{seed}")
    known = TASKS[task]
    return [
        Question(
            f"{HELDOUT}-{task}-{number}",
            task,
            HELDOUT,
            example.messages[-1]["content"],
            known.max_new_tokens,
            lambda output, example=example: known.verify(example, output),  # type: ignore[misc]
        )
        for number, example in enumerate(known.generate(rng, "heldout", count))
    ]


def heldout_mix(per_task: int, seed: int) -> list[Question]:
    """``per_task`` questions of each specialist's task and as many general ones, shuffled."""
    mixed = [q for task in SPECIALISTS for q in generated(task, per_task, seed)]
    mixed += by_hand(DATA / "general.jsonl", HELDOUT)[:per_task]
    Random(seed).shuffle(mixed)
    return mixed


def paraphrases() -> list[Question]:
    """Everything in ``data/paraphrases``: written by hand, after none of the templates."""
    files = sorted((DATA / "paraphrases").glob("*.jsonl"))
    return [question for file in files for question in by_hand(file, PARAPHRASE)]
