"""Text to SQL over a described schema; answers are judged by running them on SQLite.

A question is drawn in three steps: a schema (tables, a subset of their columns, distractor
tables), a reference query over it, and a phrasing. Tables, text values, thresholds and phrasings
of the held-out split never occur in training.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from .sql_schema import Column, Table, draw_tables, draw_threshold, populate
from .task import Example, Split, Task, read_phrases, user_turn

DATABASES = 3
MAX_RESULT_ROWS = 2_000
PROGRESS_LIMIT = 200_000

FRAMES: dict[Split, tuple[str, ...]] = {
    "train": (
        "Write a SQL query.\n\n{schema}\n\nQuestion: {question}",
        "Given these tables:\n{schema}\n{question} Answer with SQL only.",
        "{schema}\n\nTranslate to SQL: {question}",
        "{question} Write the SQLite query for this schema:\n{schema}",
        "You have the tables\n{schema}\n\nQuestion: {question}\nSQL:",
        "Turn the question into a SQL query.\nTables:\n{schema}\nQuestion: {question}",
        "Schema: {schema}\nWrite SQL to answer: {question}",
        "{question}\n{schema}",
        "{question}\n\nTables:\n{schema}",
        "Database:\n{schema}\n\n{question} Give only the SQL.",
        "I have these SQL tables:\n{schema}\nPlease write a query. {question}",
        "{question} Use SQL. The schema is:\n{schema}",
        "What SQL query answers this? {question}\n\n{schema}",
        "SQL question: {question}\nSchema:\n{schema}\nReturn just the query.",
    ),
    "heldout": (
        "I need the SQL for this: {question}\nMy database looks like this:\n{schema}",
        "Here is a database.\n{schema}\n\nHow would I ask it the following in SQL? {question}",
        "{question}\n\nReply with one SQL statement and nothing else. The tables are:\n{schema}",
    ),
}

_TEXT_IS: dict[Split, tuple[str, ...]] = {
    "train": (
        "whose {c} is {v}",
        "with {c} {v}",
        "where the {c} is '{v}'",
        "that have the {c} {v}",
        "whose {c} is '{v}'",
        "of {c} {v}",
        "having {c} = {v}",
        "with '{v}' for {c}",
        'that have "{v}" in {c}',
        "where {c} is {v}",
    ),
    "heldout": ("whose {c} equals {v}", 'with "{v}" as their {c}'),
}
_COMPARE: dict[Split, dict[str, tuple[str, ...]]] = {
    "train": {
        ">": (
            "with {c} over {n}",
            "whose {c} is greater than {n}",
            "with a {c} above {n}",
            "where {c} is more than {n}",
            "with {c} higher than {n}",
            "whose {c} is over {n}",
            "having {c} > {n}",
            "with more {c} than {n}",
        ),
        "<": (
            "with {c} under {n}",
            "whose {c} is less than {n}",
            "with a {c} below {n}",
            "where {c} is smaller than {n}",
            "with {c} less than {n}",
            "whose {c} is under {n}",
            "having {c} < {n}",
            "with less {c} than {n}",
        ),
        ">=": (
            "with {c} of at least {n}",
            "whose {c} is {n} or more",
            "whose {c} is at least {n}",
            "with {c} no less than {n}",
            "with {c} from {n} upwards",
            "having {c} >= {n}",
        ),
        "<=": (
            "with {c} of at most {n}",
            "whose {c} is {n} or less",
            "whose {c} is at most {n}",
            "with {c} no more than {n}",
            "with {c} up to {n}",
            "having {c} <= {n}",
        ),
    },
    "heldout": {
        ">": ("whose {c} exceeds {n}",),
        "<": ("with {c} lower than {n}",),
        ">=": ("with a minimum {c} of {n}",),
        "<=": ("with a maximum {c} of {n}",),
    },
}
_BETWEEN: dict[Split, tuple[str, ...]] = {
    "train": (
        "with {c} between {n} and {m}",
        "whose {c} is between {n} and {m}",
        "with {c} from {n} to {m}",
        "having a {c} in the range {n} to {m}",
    ),
    "heldout": ("whose {c} lies between {n} and {m}",),
}
_AGGREGATES: dict[Split, dict[str, tuple[str, ...]]] = {
    "train": {
        "AVG": ("average {c}", "mean {c}", "average of the {c}", "mean value of {c}"),
        "SUM": ("total {c}", "sum of the {c}", "summed {c}", "overall {c}", "{c} added up"),
        "MAX": ("highest {c}", "maximum {c}", "greatest {c}", "biggest {c}", "top {c}"),
        "MIN": ("lowest {c}", "minimum {c}", "least {c}", "bottom {c}"),
    },
    "heldout": {
        "AVG": ("{c} on average",),
        "SUM": ("{c} in total",),
        "MAX": ("largest {c}",),
        "MIN": ("smallest {c}",),
    },
}


PHRASES = read_phrases("sql_phrases")


@dataclass(frozen=True)
class _Query:
    question: str
    sql: str


@dataclass(frozen=True)
class _Draw:
    """The random choices of one question."""

    rng: Random
    split: Split
    tables: tuple[Table, ...]

    @property
    def main(self) -> Table:
        return self.tables[0]

    @property
    def parent(self) -> Table:
        return self.tables[1]

    def say(self, key: str) -> str:
        return self.rng.choice(PHRASES[self.split][key])

    def text(self, table: Table) -> Column:
        return self.rng.choice(table.of_kind("text"))

    def number(self, table: Table) -> Column:
        return self.rng.choice(table.of_kind("number"))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _name(table: Table, column: Column, qualified: bool) -> str:
    return f"{table.name}.{column.name}" if qualified else column.name


def _condition(
    draw: _Draw, table: Table, *, qualified: bool = False, without: str = ""
) -> tuple[str, str, str]:
    """(phrase, SQL, column name) of one comparison on a column other than ``without``."""
    column = draw.rng.choice(
        [c for c in table.columns if c.kind in ("text", "number") and c.name != without]
    )
    name, said = _name(table, column, qualified), _words(column.name)
    if column.kind == "text":
        value = draw.rng.choice(column.values)
        phrase = draw.rng.choice(_TEXT_IS[draw.split]).format(c=said, v=value)
        return phrase, f"{name} = '{value}'", column.name
    low = draw_threshold(draw.rng, column, draw.split)
    if draw.rng.random() < 0.15:
        low, high = sorted((low, draw_threshold(draw.rng, column, draw.split)))
        phrase = draw.rng.choice(_BETWEEN[draw.split]).format(c=said, n=low, m=high)
        return phrase, f"{name} BETWEEN {low} AND {high}", column.name
    operator = draw.rng.choice((">", "<", ">=", "<="))
    phrase = draw.rng.choice(_COMPARE[draw.split][operator]).format(c=said, n=low)
    return phrase, f"{name} {operator} {low}", column.name


def _conditions(draw: _Draw, table: Table) -> tuple[str, str]:
    """Zero to three conditions, the third nested: ``a AND (b OR c)``."""
    count = draw.rng.choice((0, 1, 1, 1, 2, 2, 3))
    if count == 0:
        return "", ""
    phrase, sql, used = _condition(draw, table)
    if count == 1:
        return f" {phrase}", f" WHERE {sql}"
    second, second_sql, also = _condition(draw, table, without=used)
    if count == 2:
        word = draw.rng.choice(("and", "and", "or"))
        return f" {phrase} {word} {second}", f" WHERE {sql} {word.upper()} {second_sql}"
    third, third_sql, _ = _condition(draw, table, without=also)
    return (
        f" {phrase} and either {second} or {third}",
        f" WHERE {sql} AND ({second_sql} OR {third_sql})",
    )


def _aggregate(draw: _Draw, column: Column) -> tuple[str, str]:
    function = draw.rng.choice(("AVG", "SUM", "MAX", "MIN"))
    said = draw.rng.choice(_AGGREGATES[draw.split][function]).format(c=_words(column.name))
    return said, function


def _select(draw: _Draw) -> _Query:
    table = draw.main
    picked = draw.rng.sample(
        table.data_columns, min(len(table.data_columns), draw.rng.choice((1, 1, 2, 3)))
    )
    said, where = _conditions(draw, table)
    listed = " and ".join(_words(c.name) for c in picked)
    frame = draw.say(
        "select",
    )
    return _Query(
        frame.format(cols=listed, t=_words(table.name), w=said),
        f"SELECT {', '.join(c.name for c in picked)} FROM {table.name}{where}",
    )


def _count(draw: _Draw) -> _Query:
    said, where = _conditions(draw, draw.main)
    frame = draw.say(
        "count",
    )
    return _Query(
        frame.format(t=_words(draw.main.name), w=said),
        f"SELECT COUNT(*) FROM {draw.main.name}{where}",
    )


def _aggregate_one(draw: _Draw) -> _Query:
    column = draw.number(draw.main)
    said, function = _aggregate(draw, column)
    phrase, where = _conditions(draw, draw.main)
    frame = draw.say(
        "aggregate_one",
    )
    return _Query(
        frame.format(a=said, t=_words(draw.main.name), w=phrase),
        f"SELECT {function}({column.name}) FROM {draw.main.name}{where}",
    )


def _top(draw: _Draw) -> _Query:
    table, column, shown = draw.main, draw.number(draw.main), draw.text(draw.main)
    count, down = draw.rng.randint(2, 9), draw.rng.random() < 0.6
    frame = draw.say(
        "top",
    )
    extreme = draw.say("highest") if down else draw.say("lowest")
    return _Query(
        frame.format(
            s=_words(shown.name), k=count, t=_words(table.name), x=extreme, c=_words(column.name)
        ),
        f"SELECT {shown.name} FROM {table.name} ORDER BY {column.name} "
        f"{'DESC' if down else 'ASC'} LIMIT {count}",
    )


def _group(draw: _Draw) -> _Query:
    table, by = draw.main, draw.text(draw.main)
    if draw.rng.random() < 0.5:
        said, function = _aggregate(draw, column := draw.number(table))
        measured = f"{function}({column.name})"
    else:
        said, measured = draw.say("count_of_group"), "COUNT(*)"
    frame = draw.say(
        "group",
    )
    return _Query(
        frame.format(a=said, t=_words(table.name), b=_words(by.name)),
        f"SELECT {by.name}, {measured} FROM {table.name} GROUP BY {by.name}",
    )


def _having(draw: _Draw) -> _Query:
    table, by, least = draw.main, draw.text(draw.main), draw.rng.randint(1, 6)
    frame = draw.say(
        "having",
    )
    return _Query(
        frame.format(b=_words(by.name), n=least, t=_words(table.name)),
        f"SELECT {by.name} FROM {table.name} GROUP BY {by.name} HAVING COUNT(*) > {least}",
    )


def _distinct(draw: _Draw) -> _Query:
    column = draw.text(draw.main)
    said, where = _conditions(draw, draw.main)
    frame = draw.say(
        "distinct",
    )
    return _Query(
        frame.format(c=_words(column.name), t=_words(draw.main.name), w=said),
        f"SELECT DISTINCT {column.name} FROM {draw.main.name}{where}",
    )


def _beyond_average(draw: _Draw) -> _Query:
    table, column, shown = draw.main, draw.number(draw.main), draw.text(draw.main)
    above = draw.rng.random() < 0.6
    frame = draw.say(
        "beyond_average",
    )
    return _Query(
        frame.format(
            s=_words(shown.name),
            t=_words(table.name),
            c=_words(column.name),
            x="above" if above else "below",
        ),
        f"SELECT {shown.name} FROM {table.name} WHERE {column.name} {'>' if above else '<'} "
        f"(SELECT AVG({column.name}) FROM {table.name})",
    )


def _join_clause(draw: _Draw) -> str:
    child, parent = draw.main, draw.parent
    return (
        f"{child.name} JOIN {parent.name} ON {child.name}.{parent.singular}_id = {parent.name}.id"
    )


def _join_filter(draw: _Draw) -> _Query:
    child, parent = draw.main, draw.parent
    phrase, sql, _ = _condition(draw, parent, qualified=True)
    if draw.rng.random() < 0.4:
        picked, listed = "COUNT(*)", ""
        frame = draw.say(
            "join_count",
        )
    else:
        column = draw.rng.choice(child.data_columns)
        picked, listed = f"{child.name}.{column.name}", _words(column.name)
        frame = draw.say(
            "join_filter",
        )
    return _Query(
        frame.format(c=listed, t=_words(child.name), p=_words(parent.name), w=phrase),
        f"SELECT {picked} FROM {_join_clause(draw)} WHERE {sql}",
    )


def _join_columns(draw: _Draw) -> _Query:
    child, parent = draw.main, draw.parent
    mine, theirs = draw.rng.choice(child.data_columns), draw.text(parent)
    frame = draw.say(
        "join_columns",
    )
    return _Query(
        frame.format(
            c=_words(mine.name),
            t=_words(child.name),
            d=_words(theirs.name),
            p=_words(parent.singular),
        ),
        f"SELECT {child.name}.{mine.name}, {parent.name}.{theirs.name} FROM {_join_clause(draw)}",
    )


def _join_group(draw: _Draw) -> _Query:
    child, parent, by = draw.main, draw.parent, draw.text(draw.parent)
    if draw.rng.random() < 0.5:
        said, function = _aggregate(draw, column := draw.number(child))
        measured = f"{function}({child.name}.{column.name})"
    else:
        said, measured = draw.say("count_of_group"), "COUNT(*)"
    frame = draw.say(
        "join_group",
    )
    return _Query(
        frame.format(a=said, t=_words(child.name), p=_words(parent.singular), b=_words(by.name)),
        f"SELECT {parent.name}.{by.name}, {measured} FROM {_join_clause(draw)} "
        f"GROUP BY {parent.name}.{by.name}",
    )


def _childless(draw: _Draw) -> _Query:
    child, parent, shown = draw.main, draw.parent, draw.text(draw.parent)
    frame = draw.say(
        "childless",
    )
    return _Query(
        frame.format(s=_words(shown.name), p=_words(parent.name), t=_words(child.name)),
        f"SELECT {shown.name} FROM {parent.name} WHERE id NOT IN "
        f"(SELECT {parent.singular}_id FROM {child.name})",
    )


_SINGLE: tuple[tuple[Callable[[_Draw], _Query], int], ...] = (
    (_select, 6),
    (_count, 4),
    (_aggregate_one, 4),
    (_top, 3),
    (_group, 3),
    (_having, 1),
    (_distinct, 2),
    (_beyond_average, 2),
)
_JOINED: tuple[tuple[Callable[[_Draw], _Query], int], ...] = (
    (_join_filter, 5),
    (_join_columns, 2),
    (_join_group, 3),
    (_childless, 2),
)


_NOTATIONS = {
    "create": "CREATE TABLE {t} ({cols});",
    "call": "{t}({cols})",
    "spaced": "{t} ({cols})",
    "typed": "{t}({cols})",
    "list": "Table {t} has columns {cols}.",
    "bracket": "{t} [{cols}]",
    "table": "table {t}: {cols}",
    "star": "* {t} with {cols}",
}


def _types(column: Column) -> str:
    return "TEXT" if column.kind == "text" else "INTEGER"


def _render(draw: _Draw) -> str:
    """The schema as people paste it; the held-out split has a notation of its own."""
    tables = list(draw.tables)
    draw.rng.shuffle(tables)
    style = draw.rng.choice(tuple(_NOTATIONS)) if draw.split == "train" else ""
    notation = _NOTATIONS.get(style, "- {t}: {cols}")
    lines = []
    for table in tables:
        names = [c.name for c in table.columns]
        typed = [f"{c.name} {_types(c)}" for c in table.columns]
        said = ", ".join(typed if style in ("create", "typed") else names)
        lines.append(notation.format(t=table.name, cols=said))
    return "\n".join(lines)


def _example(rng: Random, split: Split) -> Example | None:
    joined = rng.random() < 0.4
    kinds = _JOINED if joined else _SINGLE
    draw = _Draw(rng, split, draw_tables(rng, split, joined=joined))
    (kind,) = rng.choices([k for k, _ in kinds], weights=[w for _, w in kinds])
    query, row_seed = kind(draw), rng.randrange(2**31)
    frame = rng.choice(FRAMES[split])
    prompt = frame.format(schema=_render(draw), question=query.question)
    meta = {
        "kind": kind.__name__.strip("_"),
        "tables": [asdict(t) for t in draw.tables],
        "sql": query.sql,
        "row_seed": row_seed,
    }
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


def extract_sql(output: str) -> str:
    """The first SELECT or WITH statement in ``output``, from a code fence where there is one."""
    fenced = re.search(r"```(?:sql|sqlite)?\s*\n(.*?)(?:```|\Z)", output, re.S | re.I)
    text = fenced.group(1) if fenced else output
    start = re.search(r"\b(?:SELECT|WITH)\b", text, re.I)
    return text[start.start() :].split(";")[0].strip() if start else ""


_ALLOWED_ACTIONS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    getattr(sqlite3, "SQLITE_RECURSIVE", 33),
}


def _databases(meta: dict[str, Any]) -> list[sqlite3.Connection]:
    tables = [Table.from_dict(t) for t in meta["tables"]]
    return [populate(tables, meta["row_seed"] + k) for k in range(DATABASES)]


def run_query(db: sqlite3.Connection, sql: str) -> list[tuple[Any, ...]]:
    """Rows of a read-only query; anything else, or too much work, is a ``sqlite3.Error``."""
    db.set_authorizer(
        lambda action, *_: sqlite3.SQLITE_OK if action in _ALLOWED_ACTIONS else sqlite3.SQLITE_DENY
    )
    steps = iter(range(PROGRESS_LIMIT // 1_000))
    db.set_progress_handler(lambda: next(steps, None) is None, 1_000)
    return db.execute(sql).fetchmany(MAX_RESULT_ROWS)


def _comparable(rows: list[tuple[Any, ...]], ordered: bool) -> list[str]:
    shown = [repr(tuple(round(v, 6) if isinstance(v, float) else v for v in r)) for r in rows]
    return shown if ordered else sorted(shown)


def verify(example: Example, output: str) -> bool:
    """Whether the query in ``output`` returns the reference's rows on every generated database."""
    sql, reference = extract_sql(output), example.meta["sql"]
    if not sql:
        return False
    ordered = "ORDER BY" in reference
    for db in _databases(example.meta):
        try:
            got = run_query(db, sql)
        except (sqlite3.Error, sqlite3.Warning):
            return False
        if _comparable(got, ordered) != _comparable(run_query(db, reference), ordered):
            return False
    return True


TASK = Task(
    name="sql",
    summary="text to SQL over a described schema",
    generate=generate,
    verify=verify,
    max_new_tokens=80,
    train_steps=130,
)
