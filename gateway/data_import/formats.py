"""Readers of public routing data sets, one function per format.

Each yields answers with the file and row they stand in; None in place of an answer is a row that
holds no score.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from experts.errors import ConfigError
from gateway.data_import.answers import Answer
from gateway.data_import.fields import Row
from gateway.data_import.tables import data_files, json_object, read_rows

__all__ = ["FORMATS", "Reader", "Recorded"]

Recorded = tuple[Row, Answer | None]
Reader = Callable[[Path], Iterator[Recorded]]

_ROUTERBENCH_COST = "|total_cost"


def routerbench(source: Path) -> Iterator[Recorded]:
    """RouterBench's wide table: a row per prompt; per model its score and ``model|total_cost``.

    Columns sample_id, prompt, eval_name besides. Prompts are a text, or a list of one text.
    """
    for file in data_files(source):
        for row in read_rows(file):
            models = [c[: -len(_ROUTERBENCH_COST)] for c in row.values if _is_cost(c)]
            if not models:
                raise row.error(
                    f"<model>{_ROUTERBENCH_COST}", "no such column: not RouterBench's wide table"
                )
            prompt = _prompt(row)
            for model in models:
                score = row.score(model)
                answer = Answer(
                    prompt=prompt,
                    expert=model,
                    score=score if score is not None else 0.0,
                    cost=row.amount(model + _ROUTERBENCH_COST),
                    query_id=row.name("sample_id"),
                    category=row.text("eval_name"),
                )
                yield row, answer if score is not None else None


def _is_cost(column: str) -> bool:
    return isinstance(column, str) and column.endswith(_ROUTERBENCH_COST)


def _prompt(row: Row) -> str:
    value = row.values.get("prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return replace(row, values={"prompt": value[0]}).text("prompt")
    return row.text("prompt")


def routellm(source: Path) -> Iterator[Recorded]:
    """RouteLLM's responses: ``prompt`` and a True/False column per model; other columns are text.

    One file, or a folder of mmlu_<domain>.csv; the domain is the category. No cost is recorded.
    """
    for file in data_files(source):
        category = file.stem.removeprefix("mmlu_").removesuffix("_responses")
        models: list[str] = []
        for row in read_rows(file):
            models = models or [c for c, v in row.values.items() if _is_truth(v)]
            if len(models) < 2:
                raise row.error("prompt", "fewer than two True/False columns: not RouteLLM's file")
            prompt = row.text("prompt")
            for model in models:
                if not _is_truth(row.values[model]):
                    raise row.error(model, f"must be True or False, not {row.values[model]!r:.60}")
                score = row.score(model)
                assert score is not None
                yield row, Answer(prompt, model, score, category=category)


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or (
        isinstance(value, str) and value.strip().lower() in ("true", "false")
    )


def embedllm(source: Path) -> Iterator[Recorded]:
    """EmbedLLM's long table: prompt, model_name (or model_id, or model), label 0 or 1.

    prompt_id and category are taken if they are there. No cost is recorded.
    """
    for file in data_files(source):
        for row in read_rows(file):
            columns = row.values
            model = next((c for c in ("model_name", "model", "model_id") if c in columns), "model")
            category = "category" if "category" in columns else "category_id"
            score = row.score("label")
            answer = Answer(
                prompt=row.text("prompt"),
                expert=row.name(model),
                score=score if score is not None else 0.0,
                query_id=row.name("prompt_id") if "prompt_id" in columns else None,
                category=row.name(category) if category in columns else None,
            )
            yield row, answer if score is not None else None


def llmrouterbench(source: Path) -> Iterator[Recorded]:
    """LLMRouterBench's results: <dataset>/<split>/<model>/*.json, each with a list ``records``.

    Of several runs of one model on one split the last by file name counts; demos are left out.
    """
    runs: dict[tuple[str, str, str], tuple[Path, dict[str, Any]]] = {}
    for file in data_files(source):
        if file.suffix != ".json":
            continue
        run = Row(file, 1, json_object(file))
        if not isinstance(run.values.get("records"), list):
            raise run.error("records", "must be a list: not a result of LLMRouterBench")
        if not run.values.get("demo"):
            key = (run.text("dataset_name"), run.text("split"), run.text("model_name"))
            runs[key] = (file, dict(run.values))
    for (dataset, split, model), (file, content) in sorted(runs.items()):
        for number, record in enumerate(content["records"], start=1):
            if not isinstance(record, dict):
                raise ConfigError(str(file), number, "records", "each must be a JSON object")
            row = Row(file, number, record)
            score = row.score("score")
            answer = Answer(
                prompt=row.text("origin_query"),
                expert=model,
                score=score if score is not None else 0.0,
                cost=row.amount("cost"),
                query_id=f"{dataset}/{split}/{row.name('index')}",
                category=dataset,
                input_tokens=row.amount("prompt_tokens"),
                output_tokens=row.amount("completion_tokens"),
            )
            yield row, answer if score is not None else None


def routerarena(source: Path) -> Iterator[Recorded]:
    """RouterArena's prediction files: a list of ``global index``, prompt, prediction, accuracy,
    cost and generated_result. A folder with a file per model gives the whole table.
    """
    for file in data_files(source):
        for row in read_rows(file):
            score = row.score("accuracy")
            result = row.values.get("generated_result")
            usage = result.get("token_usage") if isinstance(result, dict) else None
            tokens = replace(row, values=usage if isinstance(usage, dict) else {})
            identity = row.name("global index")
            answer = Answer(
                prompt=row.text("prompt"),
                expert=row.text("prediction"),
                score=score if score is not None else 0.0,
                cost=row.amount("cost"),
                query_id=identity,
                category=identity.rpartition("_")[0] or None,
                input_tokens=tokens.amount("input_tokens"),
                output_tokens=tokens.amount("output_tokens"),
            )
            yield row, answer if score is not None else None


def jsonl(source: Path) -> Iterator[Recorded]:
    """One object per answer: prompt, expert, score; optional cost, query_id, category, source,
    confidence, latency_ms, input_tokens, output_tokens.
    """
    for file in data_files(source):
        for row in read_rows(file):
            score = row.score("score")
            has = row.values.get
            answer = Answer(
                prompt=row.text("prompt"),
                expert=row.name("expert"),
                score=score if score is not None else 0.0,
                cost=row.amount("cost"),
                query_id=row.name("query_id") if has("query_id") is not None else None,
                category=row.name("category") if has("category") is not None else None,
                source=row.name("source") if has("source") is not None else None,
                confidence=row.number_of("confidence"),
                latency_ms=row.amount("latency_ms"),
                input_tokens=row.amount("input_tokens"),
                output_tokens=row.amount("output_tokens"),
            )
            yield row, answer if score is not None else None


FORMATS: dict[str, Reader] = {
    "embedllm": embedllm,
    "jsonl": jsonl,
    "llmrouterbench": llmrouterbench,
    "routellm": routellm,
    "routerarena": routerarena,
    "routerbench": routerbench,
}
