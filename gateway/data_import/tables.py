"""Rows of CSV, JSON, JSON lines and Parquet files. Pickle is refused: loading it runs code."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from experts.errors import ConfigError
from gateway.data_import.fields import Row

__all__ = ["data_files", "json_object", "read_rows"]

_FIELD_CHARS_MAX = 16 << 20
_JSON_BYTES_MAX = 2 << 30
_BATCH_ROWS = 1024
_PICKLES = frozenset({".pkl", ".pickle", ".p"})
_READABLE = (".csv", ".json", ".jsonl", ".parquet")


def data_files(source: Path) -> list[Path]:
    """The file itself, or a folder's readable files in name order. Raises ConfigError."""
    if source.is_dir():
        found = sorted(p for p in source.rglob("*") if p.suffix in _READABLE and p.is_file())
        if not found:
            raise ConfigError(str(source), None, "", f"holds no {', '.join(_READABLE)} file")
        return found
    if not source.is_file():
        raise ConfigError(str(source), None, "", "not found")
    if source.suffix in _PICKLES:
        raise ConfigError(
            str(source),
            None,
            "",
            "a pickle runs code when it is loaded, so it is not read. Where you trust the file, "
            'convert it: python -c "import pandas as pd; '
            f"pd.read_pickle('{source.name}').to_parquet('{source.stem}.parquet')\"",
        )
    if source.suffix not in _READABLE:
        raise ConfigError(str(source), None, "", f"must be {', '.join(_READABLE)}")
    return [source]


def read_rows(file: Path) -> Iterator[Row]:
    """Every record of one file, in its order. Raises ConfigError."""
    if file.suffix == ".csv":
        return _csv_rows(file)
    if file.suffix == ".parquet":
        return _parquet_rows(file)
    if file.suffix == ".jsonl":
        return _line_rows(file)
    content = _load_json(file)
    if not isinstance(content, list):
        raise ConfigError(str(file), None, "", "must be a JSON list of objects")
    return _object_rows(file, content)


def json_object(file: Path) -> dict[str, Any]:
    """A file that holds one JSON object. Raises ConfigError."""
    content = _load_json(file)
    if not isinstance(content, dict):
        raise ConfigError(str(file), None, "", "must be a JSON object")
    return content


def _load_json(file: Path) -> Any:
    if file.stat().st_size > _JSON_BYTES_MAX:
        raise ConfigError(str(file), None, "", "is larger than 2 GiB; split it or use Parquet")
    try:
        return json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(file), None, "", f"not JSON in UTF-8: {error}") from error


def _csv_rows(file: Path) -> Iterator[Row]:
    csv.field_size_limit(_FIELD_CHARS_MAX)
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines, strict=True)
        while True:
            number = reader.line_num + 1
            try:
                record = next(reader, None)
            except (csv.Error, UnicodeDecodeError) as error:
                raise ConfigError(str(file), number, "", f"not CSV in UTF-8: {error}") from error
            if record is None:
                return
            if None in record or None in record.values():
                expected = len(reader.fieldnames or ())
                raise ConfigError(
                    str(file), number, "", f"does not have the header's {expected} columns"
                )
            yield Row(file, max(number, 2), record)


def _parquet_rows(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ConfigError(str(file), None, "", f"not a Parquet file: {error}") from error
    number = 0
    for batch in parquet.iter_batches(batch_size=_BATCH_ROWS):
        for record in batch.to_pylist():
            number += 1
            yield Row(file, number, record)


def _line_rows(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ConfigError(str(file), number, "", f"not JSON in UTF-8: {error}") from error
            yield _object(file, number, record)


def _object_rows(file: Path, content: Iterable[Any]) -> Iterator[Row]:
    return (_object(file, number, record) for number, record in enumerate(content, start=1))


def _object(file: Path, number: int, record: Any) -> Row:
    if not isinstance(record, dict):
        raise ConfigError(str(file), number, "", "each entry must be a JSON object")
    return Row(file, number, record)
