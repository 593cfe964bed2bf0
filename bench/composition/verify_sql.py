"""Verifier of SQL: run the query and the reference on SQLite, compare the rows."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable
from typing import Any

MAX_RESULT_ROWS = 2_000
PROGRESS_LIMIT = 200_000
"""Virtual machine steps after which SQLite gives a query up."""

_ALLOWED_ACTIONS = {
    sqlite3.SQLITE_SELECT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_FUNCTION,
    getattr(sqlite3, "SQLITE_RECURSIVE", 33),
}

Row = tuple[Any, ...]


def extract_sql(output: str) -> str:
    """The first SELECT or WITH statement in ``output``, from a code fence where there is one."""
    fenced = re.search(r"```(?:sql|sqlite)?\s*\n(.*?)(?:```|\Z)", output, re.S | re.I)
    text = fenced.group(1) if fenced else output
    start = re.search(r"\b(?:SELECT|WITH)\b", text, re.I)
    return text[start.start() :].split(";")[0].strip() if start else ""


def open_database(setup: str) -> sqlite3.Connection:
    """A fresh in-memory database after the statements of ``setup``."""
    db = sqlite3.connect(":memory:")
    db.executescript(setup)
    return db


def run_query(db: sqlite3.Connection, sql: str) -> list[Row]:
    """Rows of a read-only query; anything else, or too much work, is a ``sqlite3.Error``."""
    db.set_authorizer(
        lambda action, *_: sqlite3.SQLITE_OK if action in _ALLOWED_ACTIONS else sqlite3.SQLITE_DENY
    )
    steps = iter(range(PROGRESS_LIMIT // 1_000))
    db.set_progress_handler(lambda: next(steps, None) is None, 1_000)
    return db.execute(sql).fetchmany(MAX_RESULT_ROWS)


def _comparable(rows: list[Row], ordered: bool) -> list[str]:
    shown = [
        repr(tuple(round(float(v), 6) if isinstance(v, (int, float)) else v for v in row))
        for row in rows
    ]
    return shown if ordered else sorted(shown)


def sql_is(
    output: str, reference: str, databases: Iterable[sqlite3.Connection], *, ordered: bool
) -> bool:
    """Whether the query in ``output`` returns the rows of ``reference`` on every database.

    The rows' order counts only when ``ordered``. Connections are left read-only.
    """
    sql = extract_sql(output)
    if not sql:
        return False
    for db in databases:
        try:
            got = run_query(db, sql)
        except (sqlite3.Error, sqlite3.Warning):
            return False
        if _comparable(got, ordered) != _comparable(run_query(db, reference), ordered):
            return False
    return True
