"""Cascade routing on recorded answers, over random half splits, beside what it generalises.

    python bench/cascade_routing.py --data DIR [--seeds 6] [--search greedy|full] [--json FILE]

DIR is a data-set folder with a ``confidence`` per answer. Every category is looked at alone: half
of its prompts train, the other half is run once. Estimates before an answer are the training means,
so what is measured is the cascade, not a router. Areas are means over splits; ``ratio`` is against
the best threshold cascade of the same run.

Two bounds say what the confidences allow, both chosen on the test rows themselves: the best chains
and thresholds on the estimates (``threshold_on_test``), and the best chains were every answer known
to be right or wrong as it comes (``perfect_verifier``). ``training_share`` trains on less.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import _report
from gateway.evaluation.cascade import CascadeData, estimates_of, evaluate_cascade
from gateway.evaluation.cascade_replay import Recorded
from gateway.evaluation.threshold_cascade import threshold_cascade
from policies.cascade_routing import Search
from routers.outcomes import Outcomes, read_outcomes

METHODS = ("cascade_routing", "threshold_cascade", "routing_alone", "zero_router")
SHARES = (0.25, 0.5)  # of the training half


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--search", choices=("greedy", "full"), default="greedy")
    parser.add_argument("--json", metavar="FILE", help="- for standard output")
    arguments = parser.parse_args()
    outcomes = read_outcomes(arguments.data)
    if outcomes.confidence is None:
        parser.error(f"{arguments.data} records no confidence")
    sets: dict[str, Any] = {}
    names = np.array(outcomes.categories or ["all"] * len(outcomes))
    for name in sorted(set(names.tolist())):
        part = outcomes.rows(np.flatnonzero(names == name))
        sets[name] = measured(part, arguments.seeds, arguments.search)
        print(name, json.dumps(sets[name]["auc"]), flush=True)
    _report.write(
        {"data": outcomes.name, "seeds": arguments.seeds, "search": arguments.search, "sets": sets},
        arguments.json,
    )


def measured(outcomes: Outcomes, seeds: int, search: Search) -> dict[str, Any]:
    """Mean areas over the splits, and how often each method was the best."""
    areas: dict[str, list[float]] = {name: [] for name in METHODS}
    at_half: dict[str, list[float]] = {}
    shares: dict[float, list[tuple[float, float]]] = {share: [] for share in SHARES}
    for seed in range(seeds):
        data = replace(halves(outcomes, seed), search=search)
        result = evaluate_cascade(data).as_json(resamples=1)
        areas["cascade_routing"].append(result["auc"])
        for name in METHODS[1:]:
            areas[name].append(result[name]["auc"])
        half = result["at_half_cost_of_best_single"]
        target = half["score"] - half["score_difference"]
        at_half.setdefault("cascade_routing", []).append(half["score_difference"])
        for name, score in _bounds(data, half["cost"]).items():
            at_half.setdefault(name, []).append(score - target)
        for share, found in shares.items():
            part = evaluate_cascade(replace(halves(outcomes, seed, share), search=search)).as_json(
                resamples=1
            )
            costs, scores = ([point[key] for point in part["curve"]] for key in ("cost", "score"))
            score = float(np.interp(half["cost"], costs, scores))
            found.append((part["auc"], score - target))
    return _summary(len(outcomes), areas, at_half, shares)


def _summary(
    rows: int,
    areas: dict[str, list[float]],
    at_half: dict[str, list[float]],
    shares: dict[float, list[tuple[float, float]]],
) -> dict[str, Any]:
    means = {name: float(np.mean(values)) for name, values in areas.items()}
    ahead = np.array(areas["cascade_routing"]) - np.array(areas["threshold_cascade"])
    return {
        "n": rows,
        "auc": means,
        "ratio": means["cascade_routing"] / means["threshold_cascade"],
        "difference": {"mean": float(ahead.mean()), "sd_over_splits": float(ahead.std())},
        "splits_ahead": int((ahead > 0).sum()),
        "score_at_half_cost_minus_best_single": {
            name: float(np.mean(values)) for name, values in at_half.items()
        },
        "training_share": {
            str(share): {
                "auc": float(np.mean([auc for auc, _ in found])),
                "score_at_half_cost_minus_best_single": float(np.mean([d for _, d in found])),
            }
            for share, found in shares.items()
        },
    }


def _bounds(data: CascadeData, cost: float) -> dict[str, float]:
    """Scores at ``cost`` of the chains that are best on the test rows; see the file's head."""
    _, known = estimates_of(data)
    test = Recorded(data.score_test, data.cost_test)
    signals = {"threshold_on_test": known.after, "perfect_verifier": data.score_test}
    return {name: _at(cost, test, signal) for name, signal in signals.items()}


def _at(cost: float, test: Recorded, signal: NDArray[np.float64]) -> float:
    score, paid = (part.mean(axis=1) for part in threshold_cascade(test, signal, test, signal))
    return float(np.interp(cost, paid, score))


def halves(outcomes: Outcomes, seed: int, share: float = 1.0) -> CascadeData:
    """A random half to test; ``share`` of the other to train on; equal prompts on one side."""
    rng = np.random.default_rng(seed)
    _, prompt = np.unique(np.array(outcomes.texts), return_inverse=True)
    rank = rng.permutation(int(prompt.max()) + 1)[prompt]
    side = rank % 2 == 0
    kept = side & (rank < share * len(np.unique(prompt)))
    train, test = (outcomes.rows(np.flatnonzero(rows)) for rows in (kept, ~side))
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
