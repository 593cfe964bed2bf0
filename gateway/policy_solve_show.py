"""What ``coe policy solve`` prints beside the policy."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from gateway.policy_solve import Budget, Solution
from routers.outcomes import Outcomes

__all__ = ["described", "show"]


def described(outcomes: Outcomes, budget: Budget) -> str:
    """The policy's ``description``: which data it comes from and what bound it."""
    bound = "no budget"
    if budget.mean_cost is not None:
        bound = f"at most {budget.mean_cost:g} {outcomes.cost_unit} a query on average"
    elif budget.parameters is not None:
        bound = f"at most {budget.parameters:g} parameters in all"
    return (
        f"Solved from {outcomes.name} ({outcomes.digest[:12]}, {len(outcomes)} queries): {bound}."
    )


def show(solution: Solution, cost_unit: str) -> None:
    """The map and what it is expected to be worth, on standard error."""
    table = Table(
        "category", "queries", "expert", "score", f"cost ({cost_unit})", "best without budget"
    )
    for row in solution.as_json()["categories"]:
        same = row["best_expert"] == row["expert"]
        best = "" if same else f"{row['best_expert']} {row['best_score']:.3f}"
        table.add_row(
            row["category"],
            str(row["rows"]),
            row["expert"],
            f"{row['score']:.3f}",
            f"{row['cost']:.6g}",
            best,
        )
    found = solution.as_json()
    console = Console(stderr=True)
    console.print(table)
    for name, one in (("this map", found["map"]), (_single_name(found), found["best_single"])):
        console.print(f"{name}: score {one['score']:.4f}, cost {one['cost']:.6g} a query")
    console.print("Solved and judged on the same rows: `coe evaluate` says what holds on others.")


def _single_name(found: dict[str, Any]) -> str:
    return f"best single expert, {found['best_single']['expert']}"
