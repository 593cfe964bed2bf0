"""What the commands of ``coe`` print for a person."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table

from gateway.progress_lines import ProgressLines

__all__ = ["progress_bar", "show_joined", "show_route", "show_training"]


@contextmanager
def progress_bar() -> Iterator[Any]:
    """``report(stage, done, total)``: bars on a terminal, else lines."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield ProgressLines(time.monotonic, lambda line: print(line, file=sys.stderr, flush=True))
        return
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:>16}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report


def show_route(explanation: dict[str, Any], live: bool) -> None:
    console = Console()
    router = explanation.get("router") or {}
    stages = explanation["plan"]["stages"]
    console.print(f"[bold]{' → '.join(s['expert'] for s in stages)}[/bold] would answer", end="")
    console.print("" if live else "   (no gateway is running: every expert taken for available)")
    gate = f", sent to general by the {router['gate']} gate" if router.get("gate") else ""
    console.print(f"category  {explanation['category']}{gate}")
    posterior = sorted((router.get("posterior") or {}).items(), key=lambda kv: -kv[1])
    if posterior:
        console.print("posterior " + "  ".join(f"{name} {p:.2f}" for name, p in posterior))
    console.print(f"policy    {explanation['policy']} ({explanation['policy_digest']})")
    for expert in explanation["eligible"]:
        state = "resident" if expert["resident"] else f"~{expert['expected_wait_ms']:.0f} ms wait"
        if not expert["available"]:
            state = "no live host"
        if live:
            console.print(f"  {expert['expert']:<12} {state}")
    for name, why in explanation["excluded"].items():
        console.print(f"  {name:<12} left out: {why}")
    for note in explanation["plan"].get("notes", ()):
        console.print(f"  note: {note}")


def show_joined(result: dict[str, Any]) -> None:
    console = Console()
    for report in result["joined"]:
        kept = "estimates per query" if report["admitted"] else "its mean score for every query"
        console.print(
            f"{report['expert']}: {report['rows']} profile rows, mean score {report['score']:.4f}; "
            f"{kept} (held-out gain {report['gain']:+.5f})"
        )
    console.print(f"written to {result['artifact']}; use it with router.artifact in coe.yaml")


def show_training(result: dict[str, Any]) -> None:
    console = Console()
    table = Table("category", "rows")
    for name, rows in result["rows_per_category"].items():
        table.add_row(name, str(rows))
    console.print(table)
    if "estimates_gain" in result:
        table = Table("estimate", "gain over the category table", "standard error")
        for name, (gain, doubt) in result["estimates_gain"].items():
            table.add_row(name, f"{gain:+.5f}", f"{doubt:.5f}")
        console.print(table)
        console.print(f"estimates in use: {', '.join(result['estimates_admitted'])}")
    for name, value in result["metrics"].items():
        if not isinstance(value, dict):
            console.print(
                f"{name:<28} {value:.4f}" if isinstance(value, float) else f"{name} {value}"
            )
    console.print(f"written to {result['artifact']}; use it with router.artifact in coe.yaml")
