"""``coe data``: import recorded outcomes, and look at a data-set folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from experts.errors import ConfigError
from gateway.data_import.answers import Answers, ImportReport
from gateway.data_import.formats import FORMATS
from gateway.json_output import write_json

__all__ = ["data_app", "import_data"]

Tick = Callable[[int], None]
_TICK_ROWS = 5_000

data_app = typer.Typer(help="Recorded outcomes: import them, look at them.", no_args_is_help=True)


class Format(StrEnum):
    """The formats that ``coe data import`` reads."""

    EMBEDLLM = "embedllm"
    JSONL = "jsonl"
    LLMROUTERBENCH = "llmrouterbench"
    ROUTELLM = "routellm"
    ROUTERARENA = "routerarena"
    ROUTERBENCH = "routerbench"


def import_data(
    source: Path,
    out: Path,
    format_name: str,
    *,
    costs: Mapping[str, float] | None = None,
    cost_unit: str | None = None,
    tick: Tick = lambda _: None,
) -> ImportReport:
    """Read ``source``, write the folder ``out``. Raises ConfigError with file, row and column."""
    answers = Answers()
    for count, (row, answer) in enumerate(FORMATS[format_name](source), start=1):
        if answer is None:
            answers.unscored += 1
        else:
            answers.add(answer, row.file, row.number)
        if count % _TICK_ROWS == 0:
            tick(count)
    return answers.write(out, name=out.name, costs=costs or {}, cost_unit=cost_unit)


@data_app.command("import")
def import_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A file, or a folder of files.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Data-set folder to write.")],
    format_name: Annotated[Format, typer.Option("--format", help="What IN is.")],
    cost: Annotated[
        list[str] | None,
        typer.Option(
            metavar="EXPERT=COST",
            help="Cost of a query to an expert whose costs are not recorded; repeatable.",
        ),
    ] = None,
    cost_unit: Annotated[str | None, typer.Option(help="Unit of the costs (default: USD).")] = None,
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write the summary as JSON; - for stdout."),
    ] = None,
) -> None:
    """Write a data-set folder from a public format, for train and evaluate."""
    with Console(stderr=True).status("reading …") as status:
        report = import_data(
            source,
            out,
            format_name.value,
            costs=_costs(cost or []),
            cost_unit=cost_unit,
            tick=lambda count: status.update(f"reading … {count} answers"),
        )
    write_json(report.as_json(), json_file)
    if json_file != "-":
        print(
            f"wrote {out}: {report.queries} queries, {len(report.experts)} experts, "
            f"{report.answers} answers; {report.complete_queries} queries answered by all"
        )
        if report.repeated or report.unscored:
            print(f"  {report.repeated} repeated answers averaged, {report.unscored} had no score")
        if report.cost_unit == "calls":
            print("  no cost is recorded: every call counts 1; set costs with --cost EXPERT=COST")


@data_app.command("check")
def check_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A data-set folder.")],
    json_file: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write the summary as JSON; - for stdout."),
    ] = None,
) -> None:
    """Check a data-set folder as train and evaluate will read it, and summarise it."""
    from routers.outcomes import read_outcomes

    data = read_outcomes(folder)
    summary: dict[str, Any] = {
        "name": data.name,
        "queries": len(data),
        "incomplete_queries": data.incomplete,
        "categories": len(set(data.categories)) if data.categories is not None else None,
        "cost_unit": data.cost_unit,
        "has_confidence": data.confidence is not None,
        "experts": {
            name: {"score": float(score), "cost": float(cost)}
            for name, score, cost in zip(
                data.experts, data.score.mean(axis=0), data.cost.mean(axis=0), strict=True
            )
        },
        "query_oracle_score": float(data.score.max(axis=1).mean()),
    }
    write_json(summary, json_file)
    if json_file != "-":
        _show(summary)


def _show(summary: Mapping[str, Any]) -> None:
    console = Console()
    table = Table("expert", "mean score", f"mean cost, {summary['cost_unit']}")
    for name, means in summary["experts"].items():
        table.add_row(name, f"{means['score']:.4f}", f"{means['cost']:.6g}")
    console.print(table)
    console.print(
        f"{summary['queries']} queries, {summary['incomplete_queries']} left out as incomplete, "
        f"{summary['categories'] or 'no'} categories; "
        f"best expert of each query: {summary['query_oracle_score']:.4f}"
    )


def _costs(entries: list[str]) -> dict[str, float]:
    costs: dict[str, float] = {}
    for entry in entries:
        expert, _, text = entry.rpartition("=")
        try:
            cost = float(text)
        except ValueError:
            cost = math.nan
        if not expert or not math.isfinite(cost) or cost < 0:
            raise ConfigError(entry, None, "--cost", "must be EXPERT=COST with a COST of 0 or more")
        costs[expert] = cost
    return costs
