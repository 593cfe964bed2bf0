"""A batch on a terminal: the bar while it runs, on standard error, and the table at its end."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from experts.types import MICRO_USD_PER_USD
from gateway.batch import Summary
from gateway.batch_plan import ExpertTotal

__all__ = ["BatchBar", "show_summary"]


class BatchBar:
    """A ``gateway.batch.Watcher``: one bar for routing, one for answers, with the time left."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:>24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._progress.stop()

    def routing(self, done: int, total: int) -> None:
        if total:
            self._show("routing", "routing", done, total)

    def sending(self, expert: str | None, done: int, total: int) -> None:
        self._show("sending", f"sending to {expert or 'whoever answers'}", done, total)

    def _show(self, key: str, title: str, done: int, total: int) -> None:
        if key not in self._tasks:  # what an earlier run did is no measure of this one's speed
            self._tasks[key] = self._progress.add_task(title, total=total, completed=done)
        self._progress.update(self._tasks[key], description=title, completed=done)


def show_summary(summary: Summary, output: str) -> None:
    """For a person, on standard output."""
    console = Console()
    console.print(_table(summary))
    console.print(
        f"{summary.answered} answered and {summary.failed} failed in {summary.elapsed_s:.1f} s; "
        f"{summary.done_before} were there already; {summary.left} left"
    )
    console.print(
        f"expert changes: {summary.changes_input_order} in input order, "
        f"{summary.changes_run_order} as run; swaps avoided: {summary.swaps_avoided}"
    )
    if summary.served_by_another:
        console.print(f"{summary.served_by_another} were served by another expert than routed to")
    if summary.cut_bytes:
        console.print(f"a torn last line of {summary.cut_bytes} bytes was cut before the run")
    if summary.left:
        console.print("stopped; run the same command again to go on")
    console.print(f"answers are in {output}", highlight=False)


def _table(summary: Summary) -> Table:
    table = Table("expert", *("lines", "failed", "input tokens", "output tokens", "cost USD"))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, total in sorted(summary.tally.experts.items()):
        table.add_row(name or "(no expert)", *_cells(total))
    table.add_section()
    table.add_row("all", *_cells(summary.tally.total))
    return table


def _cells(total: ExpertTotal) -> tuple[str, ...]:
    counts = (total.lines, total.failed, total.input_tokens, total.output_tokens)
    return (*map(str, counts), f"{total.cost_micro_usd / MICRO_USD_PER_USD:.6f}")
