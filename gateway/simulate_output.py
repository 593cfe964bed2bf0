"""How ``coe simulate`` shows its result on a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

_MICRO_USD_PER_USD = 1_000_000


def show_simulation(result: dict[str, Any]) -> None:
    """A table of the policies, and what was replayed."""
    console = Console()
    console.print(
        f"{result['trace']}: {result['requests']} requests in {result['horizon_s']:.0f} s for "
        f"{result['active_experts']} of {result['experts']} experts on {result['engines']} engines "
        f"({result['cluster']}), {result['offered_load']:.0%} of what full batches would carry; "
        f"a swap takes {result['swap_s']:.2f} s"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for column in ("goodput", "p50", "p95", "p99", "missed", "swaps", "hits", "fair", "$/Mtok"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, figures in result["policies"].items():
        table.add_row(name, *_cells(figures))
    console.print(table)
    objective_s = result["ttft_objective_s"]
    console.print(
        f"goodput: first token within {objective_s:g} s. p50 to p99: wait in seconds; never served "
        f"counts as the whole patience. clairvoyant: {_plan(result['clairvoyant_plan'])}"
    )


def write_report(result: dict[str, Any], folder: Path) -> Path:
    """One HTML page in ``folder``, which is made if need be. Returns its path."""
    from deployments.simulate.report import html_report

    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "simulate.html"
    page.write_text(html_report(result), encoding="utf-8")
    return page


def _cells(figures: dict[str, Any]) -> list[str]:
    waits = [f"{figures[f'p{percent}_wait_s']:.2f}" for percent in (50, 95, 99)]
    cost = figures["cost_micro_usd_per_mtok"]
    return [
        f"{figures['goodput']:.4f}",
        *waits,
        str(figures["missed"]),
        str(figures["swaps"]),
        f"{figures['hit_rate']:.3f}",
        f"{figures['fairness']:.3f}",
        "-" if cost is None else f"{cost / _MICRO_USD_PER_USD:.3f}",
    ]


def _plan(name: str) -> str:
    return "its own plan" if name == "planner" else f"no plan of its own beat {name}"
