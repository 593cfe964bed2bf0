"""Text to SQL over a described schema; answers are judged by running them on SQLite.

A question is drawn in three steps: a schema (tables, a subset of their columns, distractor
tables), a reference query over it, and a phrasing. Tables, text values, thresholds and phrasings
of the held-out split never occur in training.
"""

from __future__ import annotations

import sqlite3
from dataclasses import asdict
from random import Random
from typing import Any

from bench.composition.verify_sql import run_query, sql_is

from . import phrasing
from .sql_questions import JOINED, SINGLE, STEM, Draw
from .sql_schema import Column, Table, draw_tables, populate
from .task import Example, Split, Task, user_turn

DATABASES = 3

JOINED_SHARE = 0.4
MAX_PROMPT_CHARS = 520

_NOTATIONS = {
    "create": "CREATE TABLE {t} ({cols});",
    "call": "{t}({cols})",
    "spaced": "{t} ({cols})",
    "typed": "{t}({cols})",
    "list": "Table {t} has columns {cols}.",
    "bracket": "{t} [{cols}]",
    "table": "table {t}: {cols}",
    "star": "* {t} with {cols}",
    "dash": "- {t}({cols})",
}
_IN_LINE = ("call", "call", "call", "spaced", "bracket")
_HELDOUT = {"lines": "- {t}: {cols}", "line": "{t}: {cols}"}


def _types(column: Column) -> str:
    return "TEXT" if column.kind == "text" else "INTEGER"


def _render(rng: Random, split: Split, tables: list[Table], style: str, glue: str) -> str:
    """The schema as people paste it; the held-out split has notations of its own."""
    notation = _NOTATIONS.get(style) or _HELDOUT[style]
    parts = []
    for table in tables:
        typed = style in ("create", "typed")
        said = [f"{c.name} {_types(c)}" if typed else c.name for c in table.columns]
        parts.append(notation.format(t=table.name, cols=", ".join(said)))
    return glue.join(parts)


def _prompt(rng: Random, split: Split, tables: list[Table], question: str) -> str:
    """Schema and question in one of the shapes that people send."""
    styles = (rng.choice(tuple(_NOTATIONS)), rng.choice(_IN_LINE))
    block, line = styles if split == "train" else ("lines", "line")
    frame = phrasing.say(
        rng, STEM, split, "frame", schema="{schema}", line="{line}", question="{question}"
    )
    end = "" if question[-1] in ".?" or rng.random() < 0.4 else rng.choice("..?")
    asked = phrasing.slip(rng, phrasing.capital(question + end), share=0.06)
    glue = rng.choice((", ", "; ", ", ", " and ")) if split == "train" else "; "
    return (
        frame.replace("{schema}", _render(rng, split, tables, block, "\n"))
        .replace("{line}", _render(rng, split, tables, line, glue))
        .replace("{question}", asked)
    )


def _example(rng: Random, split: Split) -> Example | None:
    joined = rng.random() < JOINED_SHARE
    kinds = JOINED if joined else SINGLE
    draw = Draw(rng, split, draw_tables(rng, split, joined=joined))
    (kind,) = rng.choices([k for k, _ in kinds], weights=[w for _, w in kinds])
    query, row_seed = kind(draw), rng.randrange(2**31)
    tables = list(draw.tables)
    rng.shuffle(tables)
    prompt = _prompt(rng, split, tables, query.question)
    meta = {
        "kind": kind.__name__.strip("_"),
        "tables": [asdict(t) for t in draw.tables],
        "sql": query.sql,
        "row_seed": row_seed,
    }
    if len(prompt) > MAX_PROMPT_CHARS:
        return None
    expected = [run_query(db, query.sql) for db in _databases(meta)]
    if not any(expected):
        return None  # a query that never returns a row could not tell right from wrong
    return Example(user_turn(prompt), f"{query.sql};", meta)


def generate(rng: Random, split: Split, n: int) -> list[Example]:
    """``n`` distinct questions whose reference query returns rows on generated data."""
    found: dict[str, Example] = {}
    while len(found) < n:
        example = _example(rng, split)
        if example is not None:
            found.setdefault(example.messages[-1]["content"], example)
    return list(found.values())


def _databases(meta: dict[str, Any]) -> list[sqlite3.Connection]:
    tables = [Table.from_dict(t) for t in meta["tables"]]
    return [populate(tables, meta["row_seed"] + k) for k in range(DATABASES)]


def verify(example: Example, output: str) -> bool:
    """Whether the query in ``output`` returns the reference's rows on every generated database."""
    reference = example.meta["sql"]
    return sql_is(output, reference, _databases(example.meta), ordered="ORDER BY" in reference)


TASK = Task(
    name="sql",
    summary="text to SQL over a described schema",
    generate=generate,
    verify=verify,
    max_new_tokens=80,
    train_steps=280,
)
