"""Trains and scores the router on every data set of a folder, over several splits.

Prints mean and spread over splits of what each set is judged by, beside its baselines.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from bench._report import write
from gateway.evaluation.evaluate import EvaluateOptions, evaluate
from routers.outcomes import holds_outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of data-set folders")
    parser.add_argument("--sets", default="", help="names, separated by commas (default: all)")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--holdout", type=float, default=0.3)
    parser.add_argument("--budgets", default="", help="as in 31,54")
    parser.add_argument("--json", metavar="FILE", help="write the result here; - for stdout")
    options = parser.parse_args()
    wanted = set(filter(None, options.sets.split(",")))
    folders = [f for f in sorted(options.data.iterdir()) if holds_outcomes(f)]
    result = {f.name: over_splits(f, options) for f in folders if not wanted or f.name in wanted}
    for name, figures in result.items():
        print(name)
        for figure, row in figures["figures"].items():
            print(f"  {figure:<40}{row['mean']:>10.4f} ± {row['spread']:.4f}")
    write({"sets": result, "splits": options.splits, "holdout": options.holdout}, options.json)


def over_splits(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every split's full result, and the figures' mean and spread over splits."""
    budgets = tuple(float(b) for b in options.budgets.split(",") if b)
    runs = []
    for seed in range(options.splits):
        choice = EvaluateOptions(
            folder, train=folder, budgets=budgets, holdout=options.holdout, seed=seed
        )
        runs.append(evaluate(choice, lambda *_: None).result)
    rows = [summary(run) for run in runs]
    names = [name for name in rows[0] if all(row.get(name) is not None for row in rows)]
    return {
        "figures": {
            name: {
                "mean": statistics.fmean(row[name] for row in rows),
                "spread": statistics.pstdev([row[name] for row in rows]),
            }
            for name in names
        },
        "runs": runs,
    }


def summary(run: dict[str, Any]) -> dict[str, float | None]:
    """One split: router, baselines and their differences, as plain numbers."""
    base, router, cascade = run["baselines"], run["router"], run.get("cascade")
    single = base["best_single"]
    reached = router["cost_at_best_single_score"]
    domain = base["domain_map"]
    figures: dict[str, float | None] = {
        "best_single": single["score"],
        "domain_map": domain and domain["score"],
        "query_oracle": base["query_oracle"]["score"],
        "router_best_score": router["best_score"],
        "router_minus_best_single": router["best_score"] - single["score"],
        "cost_share_at_best_single_score": reached and reached / single["cost"],
        "zero_router_auc": run["zero_router"]["auc"],
        "router_auc": router["auc"],
        "router_minus_zero_router_auc": router["auc"] - run["zero_router"]["auc"],
        "cascade_auc": cascade and cascade["auc"],
    }
    figures |= {name: router.get(name) for name in ("apgr", "cpt50", "cpt80", "domain_map_apgr")}
    for budget, row in run["at_budget"].items():
        figures |= {
            f"at_{budget}_{name}": cell and cell["score"] for name, cell in sorted(row.items())
        }
    return figures


if __name__ == "__main__":
    main()
