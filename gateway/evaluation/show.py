"""How ``coe evaluate`` shows its result on a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["show_evaluation"]


def show_evaluation(result: dict[str, Any]) -> None:
    """Baselines and router in one table, then what depends on the set."""
    console = Console()
    console.print(
        f"{result['dataset']}: {result['n']} queries, {len(result['experts'])} experts, "
        f"{result['training_rows']} training rows; cost in {result['cost_unit']}"
    )
    console.print(_table(result))
    console.print(_curve_line(result))
    for budget, rows in result["at_budget"].items():
        cells = ", ".join(
            f"{name.replace('_', ' ')} {row['score']:.4f} at {row['cost']:.4g}"
            for name, row in rows.items()
            if row is not None
        )
        over = _interval(result["ci95"][f"router_at_{budget}_minus_zero_router"])
        console.print(f"budget {budget}: {cells}; router from zero router {over}")
    if "apgr" in (router := result["router"]):
        domain = _figure(router["domain_map_apgr"], "none given")
        console.print(f"{_pair_line(router)} (APGR of the true categories: {domain})")
    if (cascade := result.get("cascade")) is not None:
        console.print(_cascade_line(result, cascade))
    latency = result["latency_ms"]
    console.print(f"a decision takes {latency['p50']:.1f} ms (p50), {latency['p99']:.1f} ms (p99)")


def _table(result: dict[str, Any]) -> Table:
    table = Table("", "score", "cost", "from best single (95 %)", box=None, pad_edge=False)
    router = result["router"]
    rows = {
        **result["baselines"],
        "router_best_score": {"score": router["best_score"], "cost": router["best_score_cost"]},
    }
    if (cascade := result.get("cascade")) is not None:
        rows["cascade_best_score"] = {
            "score": cascade["best_score"],
            "cost": cascade["best_score_cost"],
        }
    for name, row in rows.items():
        if row is not None:
            table.add_row(
                name.replace("_", " "),
                f"{row['score']:.4f}",
                f"{row['cost']:.4g}",
                _interval(result["ci95"].get(name)),
            )
    return table


def _curve_line(result: dict[str, Any]) -> str:
    router = result["router"]
    gain = result["ci95"]["router_auc_minus_zero_router"]
    return (
        f"area under the curve {router['auc']:.4f}, zero router {result['zero_router']['auc']:.4f} "
        f"({_interval(gain)}); best single's score at cost "
        f"{_figure(router['cost_at_best_single_score'])}"
    )


def _pair_line(found: dict[str, Any]) -> str:
    """Two experts: none of it where they score the same on these queries."""
    return (
        f"APGR {_figure(found['apgr'], 'none: no gap between the two')}, "
        f"CPT50 {_figure(found['cpt50'])} %, CPT80 {_figure(found['cpt80'])} %"
    )


def _cascade_line(result: dict[str, Any], cascade: dict[str, Any]) -> str:
    pair = f"; {_pair_line(cascade)}" if "apgr" in cascade else ""
    return (
        f"cascade: area {cascade['auc']:.4f}, from the router "
        f"{_interval(result['ci95']['cascade_auc_minus_router'])}, from the threshold cascade "
        f"{_interval(cascade['ci95']['auc_minus_threshold_cascade'])}; best single's score at cost "
        f"{_figure(cascade['cost_at_best_single_score'])}{pair}"
    )


def _interval(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{found['difference']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def _figure(value: float | None, missing: str = "never") -> str:
    return missing if value is None else f"{value:.4g}"
