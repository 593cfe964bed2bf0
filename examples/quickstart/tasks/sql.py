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
from .sql_schema import Table, draw_tables, populate
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
    "create lines": "CREATE TABLE {t} (\n  {cols}\n);",
    "typed spaced": "{t} ({cols})",
    "has": "{t} has {cols}",
    "quoted": "`{t}` ({cols})",
    "arrow": "{t} -> {cols}",
    "slash": "{t} / columns: {cols}",
    "the table": "the table {t} with the columns {cols}",
    "angle": "{t}<{cols}>",
    "pipe": "{t} | {cols}",
    "brace": "{t} {{{cols}}}",
    "columns": "{t} (columns: {cols})",
    "with": "{t} with {cols}",
    "equals": "{t} = ({cols})",
    "below": "Table {t}\n  {cols}",
    "dotted": "{t}.({cols})",
    "named": "Table `{t}`, columns {cols}",
}
_IN_LINE = (
    *("call",) * 4,
    *("spaced", "bracket", "quoted", "angle", "brace", "columns", "typed"),
    *("with", "the table", "arrow"),
)
_HELDOUT = {"lines": "- {t}: {cols}", "line": "{t}: {cols}"}
_HELDOUT_DRAWS = (9, 5)
"""How many styles the held-out questions once drew from; they stay the same as styles are added."""

_TYPES = (("TEXT", "INTEGER"),) * 3 + (("text", "int"), ("VARCHAR(50)", "INT"))


def _styles(rng: Random, split: Split) -> tuple[str, str]:
    """The schema's notation in a block of its own, and in a running line."""
    if split == "train":
        return rng.choice(tuple(_NOTATIONS)), rng.choice(_IN_LINE)
    for size in _HELDOUT_DRAWS:
        rng.randrange(size)
    return "lines", "line"


def _typed(rng: Random, tables: list[Table], create: bool) -> dict[str, str]:
    """``id INTEGER PRIMARY KEY`` and the like by ``table.column``, alike for all the tables."""
    text, number = rng.choice(_TYPES)
    keyed = create and rng.random() < 0.4
    keys = {t.name: t.key for t in tables}
    said = {}
    for table in tables:
        for c in table.columns:
            extra = " PRIMARY KEY" if keyed and c.kind == "id" else ""
            if keyed and c.kind == "ref":
                extra = f" REFERENCES {table.parent}({keys[table.parent]})"
            kind = text if c.kind == "text" else number
            said[f"{table.name}.{c.name}"] = f"{c.name} {kind}{extra}"
    return said


def _render(rng: Random, split: Split, tables: list[Table], style: str, glue: str) -> str:
    """The schema as people paste it; the held-out split has notations of its own."""
    notation = _NOTATIONS.get(style) or _HELDOUT[style]
    create = style.startswith("create")
    typed = _typed(rng, tables, create) if create or style.startswith("typed") else {}
    parts = []
    for table in tables:
        columns = list(table.columns)
        if split == "train" and rng.random() < 0.15:
            rng.shuffle(columns)
        said = [typed.get(f"{table.name}.{c.name}", c.name) for c in columns]
        between = ",\n  " if style == "create lines" else ", "
        parts.append(notation.format(t=table.name, cols=between.join(said)))
    return glue.join(parts)


def _prompt(rng: Random, split: Split, tables: list[Table], question: str) -> str:
    """Schema and question in one of the shapes that people send."""
    block, line = _styles(rng, split)
    frame = phrasing.say(
        rng, STEM, split, "frame", schema="{schema}", line="{line}", question="{question}"
    )
    end = "" if question[-1] in ".?" or rng.random() < 0.4 else rng.choice("..?")
    asked = phrasing.slip(rng, phrasing.capital(question + end), share=0.06)
    closed = split == "train" and not _NOTATIONS[line].endswith("{cols}")
    glue = rng.choice((", ", "; ", ", ", " and ")) if closed else "; "
    if split == "train":
        asked = asked[:1].lower() + asked[1:] if rng.random() < 0.1 else asked
        asked += "." if "{question} " in frame and asked[-1] not in ".?" else ""
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
    train_steps=800,
)
