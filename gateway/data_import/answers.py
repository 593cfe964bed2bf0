"""Recorded answers, collected compactly and written as a data-set folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experts.errors import ConfigError

__all__ = ["Answer", "Answers", "ImportReport"]

ANSWERS_MAX = 20_000_000
_OPTIONAL = ("confidence", "latency_ms", "input_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class Answer:
    """What one expert made of one prompt. ``query_id`` None: the prompt is its own identity."""

    prompt: str
    expert: str
    score: float
    cost: float | None = None
    query_id: str | None = None
    category: str | None = None
    source: str | None = None
    confidence: float | None = None
    latency_ms: float | None = None
    input_tokens: float | None = None
    output_tokens: float | None = None


@dataclass(frozen=True, slots=True)
class ImportReport:
    """``repeated`` answers of one expert to one query were averaged; ``unscored`` left out."""

    queries: int
    experts: tuple[str, ...]
    answers: int
    repeated: int
    unscored: int
    complete_queries: int
    cost_unit: str

    def as_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class Answers:
    """Collects answers; single use."""

    def __init__(self) -> None:
        self._queries: dict[str, tuple[int, str, str | None, str | None]] = {}
        self._experts: dict[str, int] = {}
        self._rows, self._columns = array("q"), array("q")
        self._values = {name: array("d") for name in ("score", "cost", *_OPTIONAL)}
        self.unscored = 0

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, answer: Answer, file: Path, number: int) -> None:
        """Raises ConfigError when a query id comes with two prompts, or there are too many."""
        if len(self) >= ANSWERS_MAX:
            raise ConfigError(str(file), number, "", f"more than {ANSWERS_MAX} answers")
        self._rows.append(self._query(answer, file, number))
        self._columns.append(self._experts.setdefault(answer.expert, len(self._experts)))
        for name, values in self._values.items():
            value = getattr(answer, name)
            values.append(np.nan if value is None else value)

    def _query(self, answer: Answer, file: Path, number: int) -> int:
        identity = answer.query_id or hashlib.sha256(answer.prompt.encode()).hexdigest()[:24]
        known = self._queries.get(identity)
        if known is None:
            known = (len(self._queries), answer.prompt, answer.category, answer.source)
            self._queries[identity] = known
        elif known[1] != answer.prompt:
            raise ConfigError(
                str(file), number, "prompt", f"query {identity!r} came with another prompt before"
            )
        return known[0]

    def write(
        self, out: Path, *, name: str, costs: Mapping[str, float], cost_unit: str | None
    ) -> ImportReport:
        """Write the folder, all or nothing. ``costs`` per query fill in what is not recorded.

        Experts without a cost in file and ``costs`` count 1 per query, and the unit says so.
        Raises ConfigError when ``out`` exists, or ``costs`` names no expert of the data.
        """
        if out.exists():
            raise ConfigError(str(out), None, "", "exists already; name another folder")
        unknown = sorted(set(costs) - set(self._experts))
        if unknown:
            raise ConfigError(
                "--cost", None, unknown[0], f"not an expert; there are: {', '.join(self._experts)}"
            )
        if len(self._experts) < 2:
            raise ConfigError(name, None, "expert", f"{len(self._experts)} experts; 2 are needed")
        merged = self._merged()
        unit = self._fill_costs(merged, costs, cost_unit)
        report = self._report(merged, unit)
        staging = out.with_name(out.name + ".partial")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        self._write_queries(staging / "queries.parquet")
        self._write_outcomes(staging / "outcomes.parquet", merged)
        summary = {"name": name, **report.as_json(), "score": "0..1"}
        (staging / "dataset.json").write_text(json.dumps(summary, indent=2) + "\n")
        staging.rename(out)
        return report

    def _merged(self) -> dict[str, Any]:
        """One row per (query, expert), repeated answers averaged over what they record."""
        rows, columns = np.asarray(self._rows), np.asarray(self._columns)
        cells, where = np.unique(rows * len(self._experts) + columns, return_inverse=True)
        merged: dict[str, Any] = {
            "query": cells // len(self._experts),
            "expert": cells % len(self._experts),
        }
        for name, values in self._values.items():
            column = np.asarray(values)
            known = ~np.isnan(column)
            count = np.bincount(where[known], minlength=len(cells))
            total = np.bincount(where[known], weights=column[known], minlength=len(cells))
            merged[name] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        return merged

    def _fill_costs(
        self, merged: dict[str, Any], costs: Mapping[str, float], cost_unit: str | None
    ) -> str:
        fill = np.full(len(self._experts), np.nan)
        for expert, per_query in costs.items():
            fill[self._experts[expert]] = per_query
        cost = np.where(np.isnan(merged["cost"]), fill[merged["expert"]], merged["cost"])
        missing = np.isnan(cost)
        if missing.any() and not missing.all():
            expert = list(self._experts)[int(merged["expert"][missing][0])]
            raise ConfigError(
                "--cost",
                None,
                expert,
                "has answers without a cost, while others have one; "
                f"give its cost per query: --cost {expert}=0.001",
            )
        merged["cost"] = np.where(missing, 1.0, cost)
        return "calls" if missing.all() else cost_unit or "USD"

    def _report(self, merged: Mapping[str, Any], unit: str) -> ImportReport:
        answered = np.bincount(merged["query"], minlength=len(self._queries))
        return ImportReport(
            queries=len(self._queries),
            experts=tuple(self._experts),
            answers=len(merged["query"]),
            repeated=len(self) - len(merged["query"]),
            unscored=self.unscored,
            complete_queries=int((answered == len(self._experts)).sum()),
            cost_unit=unit,
        )

    def _write_queries(self, file: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {
            "query_id": list(self._queries),
            "prompt": [prompt for _, prompt, _, _ in self._queries.values()],
        }
        for at, name in ((2, "category"), (3, "source")):
            values = [query[at] for query in self._queries.values()]
            if any(value is not None for value in values):
                columns[name] = values
        pq.write_table(pa.table(columns), file)

    def _write_outcomes(self, file: Path, merged: Mapping[str, Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns: dict[str, Any] = {
            "query_id": _named(merged["query"], list(self._queries)),
            "expert": _named(merged["expert"], list(self._experts)),
            "score": merged["score"],
            "cost": merged["cost"],
        }
        for name in _OPTIONAL:
            if not np.isnan(merged[name]).all():
                columns[name] = pa.array(merged[name], mask=np.isnan(merged[name]))
        pq.write_table(pa.table(columns), file)


def _named(codes: Any, names: list[str]) -> Any:
    import pyarrow as pa

    return pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(names)).cast(
        pa.string()
    )
