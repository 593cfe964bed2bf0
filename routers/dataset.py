"""Labelled prompts from disk: a data-set folder with queries.parquet, or JSON lines."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from experts.errors import ConfigError
from routers.text import routing_text

__all__ = ["LabelledPrompts", "read_prompts"]

ROWS_PER_CATEGORY_MIN: Final = 10
CATEGORIES_MAX: Final = 256
ROWS_MAX: Final = 500_000
CATEGORY_CHARS_MAX: Final = 64
_QUERIES: Final = "queries.parquet"


@dataclass(frozen=True, slots=True)
class LabelledPrompts:
    """Distinct prompts in an order that does not depend on the order of rows on disk.

    ``texts`` are routing texts. ``groups`` name what has to stay on one side of a split: the
    ``group`` of a row when it has one (say, the template it was made from), else the row itself.
    ``digest`` is the SHA-256 over all three columns.
    """

    texts: tuple[str, ...]
    categories: tuple[str, ...]
    groups: tuple[str, ...]
    digest: str
    duplicates: int = 0
    conflicts: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(set(self.categories)))


@dataclass(frozen=True, slots=True)
class _Row:
    place: str  # file and row, for messages
    file: str
    number: int
    text: str
    category: str
    group: str | None


def read_prompts(data: Path, *, drop_conflicts: bool = False) -> LabelledPrompts:
    """Read ``prompt`` and ``category`` (and, if there, ``group``) of every row.

    ``data`` is a folder with queries.parquet, a folder with *.jsonl files, or one JSONL file.
    Equal prompts count once; equal prompts with different categories are an error unless
    ``drop_conflicts`` says to leave them all out. Raises ConfigError with file, row and remedy.
    """
    rows, duplicates, conflicts = _distinct(_rows(data), drop_conflicts)
    if not rows:
        raise ConfigError(str(data), None, "", "holds no rows")
    _check_categories(data, rows)
    rows.sort(key=lambda row: (row.text, row.category))
    groups = tuple(row.group or f"row:{row.text}" for row in rows)
    digest = hashlib.sha256()
    for row, group in zip(rows, groups, strict=True):
        digest.update(json.dumps([row.text, row.category, group]).encode() + b"\n")
    return LabelledPrompts(
        texts=tuple(row.text for row in rows),
        categories=tuple(row.category for row in rows),
        groups=groups,
        digest=digest.hexdigest(),
        duplicates=duplicates,
        conflicts=conflicts,
    )


def _rows(data: Path) -> Iterator[_Row]:
    if data.is_dir() and (data / _QUERIES).is_file():
        return _parquet_rows(data / _QUERIES)
    files = sorted(data.glob("*.jsonl")) if data.is_dir() else [data]
    if not files or not files[0].is_file():
        raise ConfigError(
            str(data), None, "", f"not found: give a folder with {_QUERIES} or *.jsonl, or a file"
        )
    return (row for file in files for row in _jsonl_rows(file))


def _parquet_rows(file: Path) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ConfigError(str(file), None, "", f"not a Parquet file: {error}") from error
    names = parquet.schema_arrow.names
    for column in ("prompt", "category"):
        if column not in names:
            raise _missing(file, None, column, names)
    columns = [name for name in ("prompt", "category", "group") if name in names]
    number = 0
    for batch in parquet.iter_batches(columns=columns):
        for record in batch.to_pylist():
            number += 1
            yield _row(file, number, record)


def _jsonl_rows(file: Path) -> Iterator[_Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ConfigError(str(file), number, "", f"not JSON in UTF-8: {error}") from error
            if not isinstance(record, dict):
                raise ConfigError(str(file), number, "", "each line must be a JSON object")
            yield _row(file, number, record)


def _row(file: Path, number: int, record: Mapping[str, Any]) -> _Row:
    if number > ROWS_MAX:
        raise ConfigError(str(file), number, "", f"more than {ROWS_MAX} rows; train on a sample")
    for column in ("prompt", "category"):
        if column not in record:
            raise _missing(file, number, column, list(record))
        value = record[column]
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(
                str(file), number, column, "must be a text that is not empty; fix or drop the row"
            )
    category, group = record["category"].strip(), record.get("group")
    if len(category) > CATEGORY_CHARS_MAX or not category.isprintable():
        raise ConfigError(
            str(file), number, "category", f"must be a name of at most {CATEGORY_CHARS_MAX} signs"
        )
    text = routing_text(record["prompt"])
    if not text:
        raise ConfigError(str(file), number, "prompt", "holds only invisible characters; drop it")
    place = f"{file.name}:{number}"
    return _Row(place, str(file), number, text, category, str(group) if group else None)


def _missing(file: Path, number: int | None, column: str, present: Sequence[str]) -> ConfigError:
    nearest = difflib.get_close_matches(column, present, n=1)
    return ConfigError(
        str(file),
        number,
        column,
        f"the column is missing; there are: {', '.join(present) or 'none'}.",
        nearest[0] if nearest else None,
    )


def _distinct(rows: Iterator[_Row], drop_conflicts: bool) -> tuple[list[_Row], int, int]:
    """Rows with distinct texts, and how many rows were left out as duplicates or conflicts."""
    first: dict[str, _Row] = {}
    total = 0
    conflicting: dict[str, _Row] = {}
    for row in rows:
        total += 1
        earlier = first.setdefault(row.text, row)
        if earlier.category != row.category:
            conflicting.setdefault(row.text, row)
    if conflicting and not drop_conflicts:
        second = next(iter(conflicting.values()))
        earlier = first[second.text]
        raise ConfigError(
            second.file,
            second.number,
            "category",
            f"{second.category!r}, but {earlier.place} holds the same prompt as "
            f"{earlier.category!r} ({len(conflicting)} such prompts in all); "
            "relabel one, or drop conflicting prompts",
        )
    kept = [row for text, row in first.items() if text not in conflicting]
    return kept, total - len(first), len(conflicting)


def _check_categories(data: Path, rows: Sequence[_Row]) -> None:
    counts = Counter(row.category for row in rows)
    if not 2 <= len(counts) <= CATEGORIES_MAX:
        raise ConfigError(
            str(data), None, "category", f"{len(counts)} categories; 2 to {CATEGORIES_MAX} can be"
        )
    small = sorted(name for name, count in counts.items() if count < ROWS_PER_CATEGORY_MIN)
    if small:
        larger = [name for name in counts if name not in small]
        nearest = difflib.get_close_matches(small[0], larger, n=1)
        raise ConfigError(
            str(data),
            next(row.number for row in rows if row.category == small[0]),
            "category",
            f"{small[0]!r} has {counts[small[0]]} prompts, fewer than {ROWS_PER_CATEGORY_MIN}; "
            "add prompts or merge it into another category."
            + (f" Also too small: {', '.join(small[1:])}." if small[1:] else ""),
            nearest[0] if nearest else None,
        )
