"""Tables of a run for the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from bench.composition.questions import CATEGORIES


def show(result: dict[str, Any], console: Console) -> None:
    """Accuracy, routing, and the figures that answer the question."""
    console.print(_accuracy("Mixed held-out questions", result["per_task"], result["overall"]))
    console.print(_accuracy("Paraphrases by hand", result["paraphrases_per_task"], {}))
    console.print(_confusion("Routing, held out", result["confusion"]))
    console.print(_confusion("Routing, paraphrases", result["confusion_paraphrases"]))
    for key in (
        "composition",
        "best_single",
        "best_single_expert",
        "gain_points",
        "ci95",
        "share_of_per_task_best",
        "routing_accuracy",
        "routing_accuracy_paraphrases",
        "specialist_gain",
        "specialist_gain_paraphrases",
        "swaps",
        "cost_micro_usd",
        "elapsed_s",
    ):
        console.print(f"{key:30} {result[key]}")


def _accuracy(title: str, scores: dict[str, dict[str, float]], overall: dict[str, float]) -> Table:
    table = Table(title=title)
    table.add_column("model")
    for column in (*CATEGORIES, *(["overall"] if overall else [])):
        table.add_column(column, justify="right")
    for model, by_task in scores.items():
        cells = [f"{by_task[task]:.0%}" if task in by_task else "" for task in CATEGORIES]
        cells += [f"{overall[model]:.1%}"] if overall else []
        table.add_row(model, *cells)
    return table


def _confusion(title: str, counts: dict[str, dict[str, int]]) -> Table:
    table = Table(title=f"{title} (rows: true, columns: decided)")
    table.add_column("")
    for category in CATEGORIES:
        table.add_column(category, justify="right")
    for task, row in counts.items():
        table.add_row(task, *(str(row[category]) for category in CATEGORIES))
    return table
