"""Cascade routing on recorded answers, over random half splits, beside what it generalises.

    python bench/cascade_routing.py --data DIR [--seeds 6] [--json FILE]

DIR is a data-set folder with a ``confidence`` per answer. Every category is looked at alone: half
of its prompts train, the other half is run once. Estimates before an answer are the training means,
so what is measured is the cascade, not a router. Areas are means over splits; ``ratio`` is against
the best threshold cascade of the same run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from gateway.evaluation.cascade import CascadeData, evaluate_cascade
from routers.outcomes import Outcomes, read_outcomes

METHODS = ("cascade_routing", "threshold_cascade", "routing_alone", "zero_router")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--json", metavar="FILE", help="- for standard output")
    arguments = parser.parse_args()
    outcomes = read_outcomes(arguments.data)
    if outcomes.confidence is None:
        parser.error(f"{arguments.data} records no confidence")
    result = {"data": outcomes.name, "seeds": arguments.seeds, "sets": {}}
    names = np.array(outcomes.categories or ["all"] * len(outcomes))
    for name in sorted(set(names.tolist())):
        part = outcomes.rows(np.flatnonzero(names == name))
        result["sets"][name] = measured(part, arguments.seeds)
        print(name, json.dumps(result["sets"][name]["auc"]), flush=True)
    text = json.dumps(result, indent=2)
    if arguments.json == "-":
        print(text)
    elif arguments.json:
        Path(arguments.json).write_text(text + "\n")


def measured(outcomes: Outcomes, seeds: int) -> dict[str, Any]:
    """Mean areas over the splits, and how often each method was the best."""
    areas: dict[str, list[float]] = {name: [] for name in METHODS}
    at_half: list[float] = []
    for seed in range(seeds):
        result = evaluate_cascade(halves(outcomes, seed)).as_json(bootstraps=1)
        areas["cascade_routing"].append(result["auc"])
        for name in METHODS[1:]:
            areas[name].append(result[name]["auc"])
        at_half.append(result["at_half_cost_of_best_single"]["score_difference"])
    means = {name: float(np.mean(values)) for name, values in areas.items()}
    ahead = np.array(areas["cascade_routing"]) - np.array(areas["threshold_cascade"])
    return {
        "n": len(outcomes),
        "auc": means,
        "ratio": means["cascade_routing"] / means["threshold_cascade"],
        "difference": {"mean": float(ahead.mean()), "sd_over_splits": float(ahead.std())},
        "splits_ahead": int((ahead > 0).sum()),
        "score_at_half_cost_minus_best_single": float(np.mean(at_half)),
    }


def halves(outcomes: Outcomes, seed: int) -> CascadeData:
    """A random half to train on, the rest to test; equal prompts stay on one side."""
    rng = np.random.default_rng(seed)
    _, prompt = np.unique(np.array(outcomes.texts), return_inverse=True)
    side = rng.permutation(int(prompt.max()) + 1)[prompt] % 2 == 0
    train, test = (outcomes.rows(np.flatnonzero(rows)) for rows in (side, ~side))
    assert train.confidence is not None
    assert test.confidence is not None
    mean = train.score.mean(axis=0)
    return CascadeData(
        experts=outcomes.experts,
        score_train=train.score,
        score_test=test.score,
        cost_train=train.cost,
        cost_test=test.cost,
        confidence_train=train.confidence,
        confidence_test=test.confidence,
        quality_train=np.tile(mean, (len(train), 1)),
        quality_test=np.tile(mean, (len(test), 1)),
        seed=seed,
    )


if __name__ == "__main__":
    main()
