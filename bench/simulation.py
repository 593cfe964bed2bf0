"""Our scheduler against the baselines on recorded traffic: several traces, sizes and seeds.

Every cell replays the same arrivals once for each policy and says by how much ours is ahead of the
best baseline, separately for goodput and for the p99 wait; the table below the run gives mean and
range over the seeds.

    python bench/simulation.py --traces FOLDER [--json FILE] [--seeds 0 1 2] [--minutes 30]

FOLDER holds the ``servegen_<name>_rates.parquet`` files (per-client request rates).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import _report
from deployments.simulate.command import SimulateOptions, simulate

RATE_SCALES = {"m-small": 0.02, "m-mid": 0.02, "m-large": 0.1}  # to the size of one node
EXPERTS = (16, 64, 150)
BASELINES = ("fcfs_lru", "llama_swap", "ollama", "static")
KEPT = (
    "goodput",
    "p50_wait_s",
    "p95_wait_s",
    "p99_wait_s",
    "max_wait_s",
    "missed",
    "swaps",
    "swaps_min",
    "hit_rate",
    "fairness",
    "cost_micro_usd_per_mtok",
)


def replay(trace: Path, name: str, experts: int, seed: int, minutes: float) -> dict[str, Any]:
    """One cell: every policy's figures, and ours beside the best baseline."""
    options = SimulateOptions(
        trace=trace, experts=experts, seed=seed, minutes=minutes, rate_scale=RATE_SCALES[name]
    )
    result = simulate(options)
    policies = {
        policy: {key: figures[key] for key in KEPT}
        for policy, figures in result["policies"].items()
    }
    ours, clairvoyant = policies["ours"], result["planner"]
    goodput = max(policies[other]["goodput"] for other in BASELINES)
    p99_s = min(policies[other]["p99_wait_s"] for other in BASELINES)
    return {
        "trace": name,
        "experts": experts,
        "active_experts": result["active_experts"],
        "requests": result["requests"],
        "offered_load": round(result["offered_load"], 3),
        "seed": seed,
        "policies": policies,
        "planner": {key: clairvoyant[key] for key in KEPT},
        "goodput_lead": ours["goodput"] - goodput,
        "p99_wait_ratio": ours["p99_wait_s"] / p99_s,
        "swaps_per_planner_swap": ours["swaps"] / max(1, clairvoyant["swaps"]),
        "swaps_per_fewest": ours["swaps"] / max(1, ours["swaps_min"]),
        "better_on_both": ours["goodput"] > goodput and ours["p99_wait_s"] < p99_s,
    }


def summary(cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and greatest over the seeds of one trace and number of experts."""
    rows: dict[str, Any] = {}
    for policy in cells[0]["policies"]:
        rows[policy] = {
            key: spread([cell["policies"][policy][key] for cell in cells])
            for key in ("goodput", "p99_wait_s", "swaps", "hit_rate")
        }
    keys = ("goodput_lead", "p99_wait_ratio", "swaps_per_planner_swap", "swaps_per_fewest")
    return {
        "trace": cells[0]["trace"],
        "experts": cells[0]["experts"],
        "policies": rows,
        **{key: spread([cell[key] for cell in cells]) for key in keys},
        "seeds_better_on_both": sum(cell["better_on_both"] for cell in cells),
        "seeds": len(cells),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": round(statistics.fmean(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def line(row: dict[str, Any]) -> str:
    """One row of the Markdown table."""
    policies = row["policies"]
    best = max(BASELINES, key=lambda name: policies[name]["goodput"]["mean"])
    shortest = min(BASELINES, key=lambda name: policies[name]["p99_wait_s"]["mean"])
    cells = (
        f"{row['trace']}, {row['experts']}",
        shown(policies["ours"]["goodput"], 3),
        f"{shown(policies[best]['goodput'], 3)} ({best})",
        shown(policies["ours"]["p99_wait_s"], 1),
        f"{shown(policies[shortest]['p99_wait_s'], 1)} ({shortest})",
        shown(policies["ours"]["swaps"], 0),
        f"{row['swaps_per_planner_swap']['mean']:.2f}",
        f"{row['swaps_per_fewest']['mean']:.2f}",
        f"{row['seeds_better_on_both']} of {row['seeds']}",
    )
    return f"| {' | '.join(cells)} |"


def shown(value: dict[str, float], digits: int) -> str:
    return f"{value['mean']:.{digits}f} [{value['min']:.{digits}f}, {value['max']:.{digits}f}]"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--names", nargs="+", default=list(RATE_SCALES), choices=RATE_SCALES)
    parser.add_argument("--experts", nargs="+", type=int, default=list(EXPERTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--json", metavar="FILE", help="write the result; '-' for standard output")
    options = parser.parse_args()
    began, cells, rows = time.monotonic(), [], []
    for name in options.names:
        trace = options.traces / f"servegen_{name}_rates.parquet"
        for experts in options.experts:
            here = [replay(trace, name, experts, s, options.minutes) for s in options.seeds]
            cells.extend(here)
            rows.append(summary(here))
            print(line(rows[-1]), file=sys.stderr, flush=True)
    _report.write(
        {
            "benchmark": "simulation",
            "minutes": options.minutes,
            "rate_scales": RATE_SCALES,
            "summary": rows,
            "cells": cells,
            "cells_better_on_both": sum(cell["better_on_both"] for cell in cells),
            "runtime_s": round(time.monotonic() - began, 1),
        },
        options.json,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
