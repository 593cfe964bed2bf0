"""Recorded outcomes from disk: queries, and what each expert made of each of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from experts.errors import ConfigError
from routers.text import routing_text

__all__ = ["Outcomes", "holds_outcomes", "read_outcomes", "text_keys"]

Float64Array = NDArray[np.float64]
IntArray = NDArray[np.int64]

ROWS_MAX: Final = 500_000
EXPERTS_MAX: Final = 512
_QUERIES: Final = "queries.parquet"
_OUTCOMES: Final = "outcomes.parquet"
_DATASET: Final = "dataset.json"
_DATASET_BYTES_MAX: Final = 1 << 20
_OPTIONAL: Final = ("confidence",)


@dataclass(frozen=True, slots=True)
class Outcomes:
    """n queries that every one of k experts answered, in an order independent of the files'.

    ``texts`` are routing texts, ``prompts`` what was asked. ``categories`` is None when the data
    has none; ``sources`` says where each query comes from, a finer label, if the data has one.
    ``score`` [n, k] is in 0..1, ``cost`` [n, k] in ``cost_unit`` per query,
    ``confidence`` [n, k] raw, or None. ``incomplete`` counts queries left out because an expert
    has no score or cost for them.
    """

    name: str
    query_ids: tuple[str, ...]
    texts: tuple[str, ...]
    prompts: tuple[str, ...]
    categories: tuple[str, ...] | None
    sources: tuple[str, ...] | None
    experts: tuple[str, ...]
    score: Float64Array
    cost: Float64Array
    confidence: Float64Array | None
    cost_unit: str
    incomplete: int
    digest: str

    def __len__(self) -> int:
        return len(self.query_ids)

    def rows(self, index: IntArray) -> Outcomes:
        """The same experts on some of the queries, in the order of ``index``."""
        some = [int(i) for i in index]
        part = replace(
            self,
            query_ids=tuple(self.query_ids[i] for i in some),
            texts=tuple(self.texts[i] for i in some),
            prompts=tuple(self.prompts[i] for i in some),
            categories=None if self.categories is None else tuple(self.categories[i] for i in some),
            sources=None if self.sources is None else tuple(self.sources[i] for i in some),
            score=self.score[some],
            cost=self.cost[some],
            confidence=None if self.confidence is None else self.confidence[some],
        )
        return replace(part, digest=_digest(part))

    def with_scores(self, score: Float64Array) -> Outcomes:
        """The same queries and experts, scored otherwise; [n, k]."""
        part = replace(self, score=score)
        return replace(part, digest=_digest(part))

    def for_experts(self, names: Sequence[str]) -> Outcomes:
        """The same queries with the columns of ``names``, in that order."""
        columns = [self.experts.index(name) for name in names]
        part = replace(
            self,
            experts=tuple(names),
            score=self.score[:, columns],
            cost=self.cost[:, columns],
            confidence=None if self.confidence is None else self.confidence[:, columns],
        )
        return replace(part, digest=_digest(part))

    def without_conflicts(self) -> Outcomes:
        """Without queries whose routing text also stands under another category."""
        if self.categories is None:
            return self
        labels: dict[str, set[str]] = {}
        for text, label in zip(self.texts, self.categories, strict=True):
            labels.setdefault(text, set()).add(label)
        kept = [i for i, text in enumerate(self.texts) if len(labels[text]) == 1]
        return self.rows(np.array(kept, dtype=np.int64))


def holds_outcomes(data: Path) -> bool:
    """Whether ``data`` is a folder with outcomes, not labelled prompts alone."""
    return data.is_dir() and (data / _OUTCOMES).is_file()


def text_keys(texts: Sequence[str]) -> NDArray[np.uint64]:
    """[n] 64-bit digests of routing texts: equal prompts are found without keeping any."""
    keys = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return np.frombuffer(b"".join(keys), dtype="<u8").astype(np.uint64)


def read_outcomes(data: Path, *, experts_min: int = 2) -> Outcomes:
    """Read a data-set folder: queries.parquet, outcomes.parquet and, if there, dataset.json.

    Queries that an expert has no score or cost for are left out and counted. Raises ConfigError,
    naming file and remedy, for missing columns, repeated rows, scores outside 0..1, negative
    costs, fewer than ``experts_min`` experts, or when more than half of the queries would be left
    out.
    """
    queries = _queries(data / _QUERIES)
    table = _table(data / _OUTCOMES, ("query_id", "expert", "score", "cost"), _OPTIONAL)
    ids: list[str] = queries["query_id"]
    experts, cells = _cells(data / _OUTCOMES, table, {q: i for i, q in enumerate(ids)})
    if len(experts) < experts_min:
        raise ConfigError(
            str(data / _OUTCOMES),
            None,
            "expert",
            f"{experts_min} or more experts are needed, to choose between, and it records "
            f"{len(experts)}; one joins a trained router with: coe train --add-expert",
        )
    known = np.isfinite(cells["score"]) & np.isfinite(cells["cost"])
    complete = np.flatnonzero(known.all(axis=1))
    if 2 * len(complete) < len(ids) or not len(complete):
        least = experts[int(known.sum(axis=0).argmin())]
        raise ConfigError(
            str(data / _OUTCOMES),
            None,
            "expert",
            f"only {len(complete)} of {len(ids)} queries have a score and a cost for every expert; "
            f"{least!r} has the fewest: leave it out and add it with: coe train --add-expert",
        )
    texts = [routing_text(prompt) for prompt in queries["prompt"]]
    categories = queries.get("category")
    order = np.array(sorted(complete, key=lambda i: (texts[i], ids[i])), dtype=np.int64)
    everything = Outcomes(
        name=data.resolve().name,
        query_ids=tuple(ids),
        texts=tuple(texts),
        prompts=tuple(queries["prompt"]),
        categories=None if categories is None else tuple(categories),
        sources=tuple(queries["source"]) if "source" in queries else None,
        experts=experts,
        score=cells["score"],
        cost=cells["cost"],
        confidence=cells.get("confidence"),
        cost_unit=str(_description(data / _DATASET).get("cost_unit", "unit not stated")),
        incomplete=len(ids) - len(complete),
        digest="",
    )
    return everything.rows(order)


def _queries(file: Path) -> dict[str, list[Any]]:
    table = _table(file, ("query_id", "prompt"), ("category", "source"))
    repeated = [q for q, count in Counter(table["query_id"]).items() if count > 1]
    if repeated:
        raise ConfigError(str(file), None, "query_id", f"{repeated[0]!r} occurs more than once")
    if len(table["prompt"]) > ROWS_MAX:
        raise ConfigError(str(file), None, "", f"more than {ROWS_MAX} rows; train on a sample")
    for number, prompt in enumerate(table["prompt"], start=1):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError(str(file), number, "prompt", "must be a text that is not empty")
    for column in ("category", "source"):  # partly labelled is not labelled
        if any(not label for label in table.get(column, ())):
            del table[column]
    return table


def _table(file: Path, wanted: Sequence[str], optional: Sequence[str]) -> dict[str, list[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except FileNotFoundError as error:
        reason = f"not found; a data set holds {_QUERIES} and {_OUTCOMES}: see coe data import"
        raise ConfigError(str(file), None, "", reason) from error
    except pa.ArrowInvalid as error:
        raise ConfigError(str(file), None, "", f"not a Parquet file: {error}") from error
    present = parquet.schema_arrow.names
    missing = [column for column in wanted if column not in present]
    if missing:
        raise ConfigError(
            str(file), None, missing[0], f"the column is missing; there are: {', '.join(present)}"
        )
    columns = [*wanted, *(column for column in optional if column in present)]
    table: dict[str, list[Any]] = parquet.read(columns=columns).to_pydict()
    return table


def _cells(
    file: Path, table: Mapping[str, list[Any]], row_of: Mapping[str, int]
) -> tuple[tuple[str, ...], dict[str, Float64Array]]:
    """Experts in name order, and each column as [n, k] with NaN where nothing is recorded."""
    experts = tuple(sorted(set(table["expert"])))
    if len(experts) > EXPERTS_MAX:
        raise ConfigError(
            str(file), None, "expert", f"{len(experts)} experts; at most {EXPERTS_MAX} can be"
        )
    column_of = {name: i for i, name in enumerate(experts)}
    unknown = next((q for q in table["query_id"] if q not in row_of), None)
    if unknown is not None:
        raise ConfigError(str(file), None, "query_id", f"{unknown!r} is not in {_QUERIES}")
    rows = np.array([row_of[q] for q in table["query_id"]], dtype=np.int64)
    columns = np.array([column_of[e] for e in table["expert"]], dtype=np.int64)
    flat = rows * len(experts) + columns
    if len(np.unique(flat)) < len(flat):
        raise ConfigError(str(file), None, "query_id", "an expert has two rows for one query")
    cells = {}
    for name in ("score", "cost", *(c for c in _OPTIONAL if c in table)):
        values = np.array(table[name], dtype=np.float64)
        _check_range(file, name, values)
        full = np.full(len(row_of) * len(experts), np.nan)
        full[flat] = values
        cells[name] = full.reshape(len(row_of), len(experts))
    return experts, cells


def _check_range(file: Path, name: str, values: Float64Array) -> None:
    highest = {"score": 1.0, "cost": np.inf}.get(name)
    if highest is None:
        return
    wrong = np.flatnonzero((values < 0) | (values > highest) | np.isinf(values))
    if len(wrong):
        bounds = "0 to 1" if name == "score" else "0 or more and finite"
        raise ConfigError(
            str(file), int(wrong[0]) + 1, name, f"must be {bounds}, not {values[wrong[0]]:g}"
        )


def _description(file: Path) -> dict[str, Any]:
    if not file.is_file() or file.stat().st_size > _DATASET_BYTES_MAX:
        return {}
    try:
        content = json.loads(file.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(file), None, "", f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(str(file), None, "", "must be a JSON object")
    return content


def _digest(outcomes: Outcomes) -> str:
    """SHA-256 over texts, labels, experts, scores, costs and, where there are any, confidences."""
    digest = hashlib.sha256()
    none = ("",) * len(outcomes)
    labels = outcomes.categories or none, outcomes.sources or none
    for row in zip(outcomes.texts, *labels, strict=True):
        digest.update(json.dumps(row).encode() + b"\n")
    digest.update(json.dumps(outcomes.experts).encode())
    for array in (outcomes.score, outcomes.cost, outcomes.confidence):
        if array is None:
            continue
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
