"""Schemas for the SQL task: table families, drawn subsets of them, and rows to run queries on.

Training also invents tables from unrelated nouns and columns: a model that has only seen thirty
plausible tables learns those by heart, and spells an unseen column the way it expects it.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, Literal

from .task import DATA, Split

ROWS_PER_TABLE = 24
INVENTED_SHARE = 0.45
HELDOUT_RESIDUE = 1
"""Thresholds n with n % 4 == 1 are held out; training sees the other three quarters."""

_POOLS: dict[Split, dict[str, str]] = {
    "train": {
        "PERSON": "Anna Weber,Tom Baker,Lucia Rossi,Omar Haddad,Mei Lin,Jack Turner,Sara Khan",
        "CITY": "Berlin,Madrid,Oslo,Chicago,Lyon,Prague,Dallas",
        "COUNTRY": "Germany,Spain,Norway,Italy,Japan,Canada",
        "COLOR": "red,blue,green,black,white",
        "COMPANY": "Acme,Globex,Initech,Umbra,Vertex",
    },
    "heldout": {
        "PERSON": "Nadia Petrov,Ben Carter,Yuki Sato,Elena Costa,Paul Meyer,Ines Lopez",
        "CITY": "Vienna,Lisbon,Boston,Kyoto,Dublin,Turin",
        "COUNTRY": "Austria,Portugal,Ireland,Brazil,Kenya",
        "COLOR": "yellow,purple,orange,silver",
        "COMPANY": "Nimbus,Orion,Zephyr,Cobalt",
    },
}


@dataclass(frozen=True)
class Column:
    """``values`` for text; ``low`` and ``high`` for numbers, both inclusive."""

    name: str
    kind: Literal["id", "ref", "text", "number"]
    values: tuple[str, ...] = ()
    low: int = 0
    high: int = 0


@dataclass(frozen=True)
class Table:
    """A table with an integer key ``id``; ``parent`` names the table its reference points to."""

    name: str
    singular: str
    columns: tuple[Column, ...]
    parent: str = ""

    @property
    def data_columns(self) -> list[Column]:
        return [c for c in self.columns if c.kind in ("text", "number")]

    @property
    def key(self) -> str:
        return self.of_kind("id")[0].name

    @property
    def reference(self) -> str:
        return self.of_kind("ref")[0].name

    def of_kind(self, kind: str) -> list[Column]:
        return [c for c in self.columns if c.kind == kind]

    @staticmethod
    def from_dict(raw: dict[str, Any]) -> Table:
        """Inverse of ``dataclasses.asdict``, also after a trip through JSON."""
        columns = tuple(Column(**{**c, "values": tuple(c["values"])}) for c in raw["columns"])
        return Table(raw["name"], raw["singular"], columns, raw["parent"])


def _column(text: str, split: Split) -> Column:
    name, _, spec = text.partition(":")
    if ".." in spec:
        low, _, high = spec.partition("..")
        return Column(name, "number", low=int(low), high=int(high))
    values = _POOLS[split][spec].split(",") if spec in _POOLS[split] else spec.split("/")
    return Column(name, "text", tuple(values))


def _columns(text: str, split: Split) -> list[Column]:
    """Column specs are separated by blanks; a word without a colon belongs to the one before."""
    specs: list[str] = []
    for word in text.split():
        if ":" in word:
            specs.append(word)
        else:
            specs[-1] += f" {word}"
    return [_column(spec, split) for spec in specs]


def families(split: Split) -> dict[str, Table]:
    """All tables of a split by singular name, with every column they can have."""
    found: dict[str, Table] = {}
    for line in (DATA / f"sql_tables_{split}.txt").read_text(encoding="utf-8").splitlines():
        head, _, body = line.partition("|")
        own, _, parent = head.partition(">")
        singular, plural = own.split()
        found[singular] = Table(plural, singular, tuple(_columns(body, split)), parent.strip())
    return found


@cache
def _invented() -> tuple[tuple[tuple[str, str], ...], tuple[Column, ...]]:
    """(singular, plural) nouns and loose columns, from which training schemas are invented."""
    nouns, specs = (
        (DATA / f"sql_{kind}_train.txt").read_text(encoding="utf-8").splitlines()
        for kind in ("nouns", "columns")
    )
    pairs = tuple((one, many) for one, many in (line.split() for line in nouns))
    return pairs, tuple(_column(spec, "train") for spec in specs)


def _invented_tables(rng: Random, joined: bool) -> tuple[Table, ...]:
    """Tables whose columns have nothing to do with their names, so that only reading helps."""
    nouns, columns = _invented()
    tables = [
        Table(many, one, tuple(rng.sample(columns, rng.randint(4, 5))))
        for one, many in rng.sample(nouns, 2 if joined else rng.choice((1, 1, 2)))
    ]
    for k, table in enumerate(tables):
        texts = [c for c in columns if c.kind == "text" and c not in table.columns]
        numbers = [c for c in columns if c.kind == "number" and c not in table.columns]
        kept = [rng.choice(texts), rng.choice(numbers), *table.columns[:3]]
        rng.shuffle(kept)
        tables[k] = Table(table.name, table.singular, tuple(kept))
    first = _with_keys(rng, tables[0], tables[1] if joined else None)
    return (first, *(_with_keys(rng, t, None) for t in tables[1:]))


def _with_keys(rng: Random, table: Table, parent: Table | None) -> Table:
    """A random subset of the columns (a text and a number at least), behind the keys."""
    columns = list(table.columns)
    rng.shuffle(columns)
    kept = columns[: rng.randint(3, len(columns))] if len(columns) > 3 else columns
    for kind in ("text", "number"):
        if not any(c.kind == kind for c in kept):
            kept.append(next(c for c in columns if c.kind == kind))
    keys = [Column("id" if rng.random() < 0.8 else f"{table.singular}_id", "id")]
    if parent is not None:
        kept.insert(rng.randint(0, len(kept)), Column(f"{parent.singular}_id", "ref"))
    return Table(table.name, table.singular, (*keys, *kept), parent.name if parent else "")


def draw_tables(rng: Random, split: Split, *, joined: bool) -> tuple[Table, ...]:
    """The table asked about, then its parent when ``joined``, then up to two distractors."""
    if split == "train" and rng.random() < INVENTED_SHARE:
        return _invented_tables(rng, joined)
    known = families(split)
    asked = rng.choice([t for t in known.values() if t.parent or not joined])
    tables: list[Table] = []
    if asked.parent and (joined or rng.random() < 0.4):
        parent = known[asked.parent]
        tables = [_with_keys(rng, asked, parent), _with_keys(rng, parent, None)]
    else:
        tables = [_with_keys(rng, asked, None)]
    taken = {t.singular for t in tables}
    others = [t for t in known.values() if t.singular not in taken]
    extra = rng.sample(others, rng.choice((0, 0, 1, 1, 2) if len(tables) == 1 else (0, 0, 1)))
    return (*tables, *(_with_keys(rng, t, None) for t in extra))


def draw_threshold(rng: Random, column: Column, split: Split) -> int:
    """A number inside the column's range, from the half of the integers this split owns."""
    span = column.high - column.low
    while True:
        n = rng.randint(column.low + span // 8, column.high - span // 8)
        if span > 1_000:
            n = n // 50 * 50 + (1 if split == "heldout" else 0)
        if (n % 4 == HELDOUT_RESIDUE) == (split == "heldout"):
            return n


def _cell(rng: Random, column: Column, row: int) -> str | int:
    if column.kind == "id":
        return row + 1
    if column.kind == "ref":
        return rng.randint(1, ROWS_PER_TABLE * 2 // 3)  # the last third of the parents have none
    if column.kind == "text":
        return rng.choice(column.values)
    return rng.randint(column.low, column.high)


def populate(tables: list[Table], seed: int) -> sqlite3.Connection:
    """A fresh in-memory database with ``ROWS_PER_TABLE`` seeded rows in each table."""
    rng, db = Random(seed), sqlite3.connect(":memory:")
    for table in tables:
        kinds = ", ".join(
            f"{c.name} {'TEXT' if c.kind == 'text' else 'INTEGER'}" for c in table.columns
        )
        db.execute(f"CREATE TABLE {table.name} ({kinds})")
        rows = [[_cell(rng, c, k) for c in table.columns] for k in range(ROWS_PER_TABLE)]
        marks = ", ".join("?" * len(table.columns))
        db.executemany(f"INSERT INTO {table.name} VALUES ({marks})", rows)
    return db
