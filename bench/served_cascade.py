"""The cascade that a policy file runs, on recorded answers, beside the one that evaluation reports.

    python bench/served_cascade.py --data DIR [--seeds 6] [--json FILE]

DIR is a data-set folder with a ``confidence`` per answer. Every category is looked at alone: half
of its prompts are what ``coe policy cascade`` fits a policy to, the other half is run at 32 prices
with the fitted numbers, by the very functions that a gateway calls (``policies.objective.choose``,
the calibrations, the bounds). Expected costs are training means. Beside it, on the same halves: the
same with one draft at most; with one draft whose news is taken to move its own estimate alone; that
with Platt's two numbers for a calibration; the evaluation's cascade routing, which chooses anew
after every answer; and the best threshold cascade. ``ratio`` is against that last one, by area.
``plan_ms`` is what choosing takes at three stages.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import _report
from bench.cascade_routing import halves
from experts.types import MICRO_USD_PER_USD
from gateway.cascade_fit import CascadeFit, fit_cascade, recorded_evidence
from gateway.evaluation.cascade import evaluate_cascade
from gateway.evaluation.curve_metrics import area
from policies.draft_chains import Option
from policies.objective import Limits, choose
from policies.types import AcceptanceRule, Calibration, ExpertTerms, PerQuery
from routers.outcomes import Outcomes, read_outcomes

FloatArray = NDArray[np.float64]
PRICES = 32
SERVED = {
    "served": 3,
    "one_draft": 2,
    "one_draft_independent": 2,
    "one_draft_independent_platt": 2,
}  # method -> stages


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--json", metavar="FILE", help="- for standard output")
    arguments = parser.parse_args()
    outcomes = read_outcomes(arguments.data)
    if outcomes.confidence is None:
        parser.error(f"{arguments.data} records no confidence")
    names = np.array(outcomes.categories or ["all"] * len(outcomes))
    sets: dict[str, Any] = {}
    for name in sorted(set(names.tolist())):
        part = replace(outcomes.rows(np.flatnonzero(names == name)), categories=None)
        sets[name] = measured(part, arguments.seeds)
        print(name, json.dumps(sets[name]["auc"]), flush=True)
    _report.write({"data": outcomes.name, "seeds": arguments.seeds, "sets": sets}, arguments.json)


def measured(outcomes: Outcomes, seeds: int) -> dict[str, Any]:
    areas: dict[str, list[float]] = {}
    at_half: dict[str, list[float]] = {}
    took_ms: list[float] = []
    for seed in range(seeds):
        for name, (auc, half) in _compared(outcomes, seed, took_ms).items():
            areas.setdefault(name, []).append(auc)
            at_half.setdefault(name, []).append(half)
    means = {name: float(np.mean(values)) for name, values in areas.items()}
    ahead = {
        name: int((np.array(areas["served"]) > np.array(values)).sum())
        for name, values in areas.items()
        if name != "served"
    }
    return {
        "n": len(outcomes),
        "auc": means,
        "ratio": means["served"] / means["threshold_cascade"],
        "splits_ahead_of": ahead,
        "plan_ms": {f"p{q}": round(float(np.percentile(took_ms, q)), 3) for q in (50, 99)},
        "score_at_half_cost_minus_best_single": {
            name: float(np.mean(values)) for name, values in at_half.items()
        },
    }


def _compared(
    outcomes: Outcomes, seed: int, took_ms: list[float]
) -> dict[str, tuple[float, float]]:
    """By method: area, and score at half of the best single expert's cost less that expert's."""
    train, test = _halves(outcomes, seed)
    data = halves(outcomes, seed)
    singles = test.cost.mean(axis=0), test.score.mean(axis=0)
    low, high = float(singles[0].min()), float(singles[0].max())
    best = int(train.score.mean(axis=0).argmax())
    half, target = float(singles[0][best]) / 2.0, float(singles[1][best])

    def figures(cost: FloatArray, score: FloatArray) -> tuple[float, float]:
        return area(cost, score, low, high), float(np.interp(half, cost, score)) - target

    fits = {
        name: fit_cascade(train, seed=seed, groups=() if name.endswith("platt") else ("doubt",))
        for name in SERVED
    }
    found = {name: figures(*_curve(fits[name], name, train, test, took_ms)) for name in SERVED}
    evaluated = evaluate_cascade(data).as_json(resamples=1)
    for name, one in (
        ("cascade_routing", evaluated),
        ("threshold_cascade", evaluated["threshold_cascade"]),
    ):
        points = np.array([[point["cost"], point["score"]] for point in one["curve"]])
        found[name] = figures(points[:, 0], points[:, 1])
    return found


def _halves(outcomes: Outcomes, seed: int) -> tuple[Outcomes, Outcomes]:
    """The same halves as ``bench.cascade_routing.halves``, as outcomes."""
    rng = np.random.default_rng(seed)
    _, prompt = np.unique(np.array(outcomes.texts), return_inverse=True)
    side = rng.permutation(int(prompt.max()) + 1)[prompt] % 2 == 0
    return outcomes.rows(np.flatnonzero(side)), outcomes.rows(np.flatnonzero(~side))


def _curve(
    fit: CascadeFit, method: str, train: Outcomes, test: Outcomes, took_ms: list[float]
) -> tuple[FloatArray, FloatArray]:
    """Mean cost and score on the test rows at every price, by ascending cost."""
    rule = PerQuery(
        quality_per_usd=0.0,
        quality_per_s=0.0,
        output_tokens_expected=1,
        quality=fit.quality,
        confidence_sd=fit.confidence_sd,
        confidence_moves={} if "independent" in method else fit.confidence_moves,
    )
    if "independent" in method:  # it was believed in full
        rule = replace(rule, confidence_sd={n: 2 * sd for n, sd in rule.confidence_sd.items()})
    cost = train.cost.mean(axis=0)
    limits = Limits(SERVED[method], 10**12, 1e9, dict.fromkeys(fit.experts, 0))
    points = []
    for price in np.geomspace(3.0, 1e-4, PRICES) / cost.mean():
        terms = _terms(fit, cost, price)
        started = time.perf_counter()
        chosen = choose(rule, terms, dict.fromkeys(fit.experts, True), limits)
        if method == "served":
            took_ms.append((time.perf_counter() - started) * 1000.0)
        assert chosen is not None
        points.append(_run(chosen, fit.calibrations, test))
    ordered = np.array(sorted(points))
    return ordered[:, 0], ordered[:, 1]


def _terms(fit: CascadeFit, cost: FloatArray, price: float) -> list[ExpertTerms]:
    terms = []
    for column, expert in enumerate(fit.experts):
        quality, money = fit.quality["general"][expert], float(price * cost[column])
        micro_usd = round(cost[column] * MICRO_USD_PER_USD)
        value = quality - money
        terms.append(ExpertTerms(expert, quality, micro_usd, 0.0, True, money, 0.0, value, False))
    return sorted(terms, key=lambda term: -term.value)


def _run(
    option: Option, calibrations: dict[str, Calibration], test: Outcomes
) -> tuple[float, float]:
    """Mean cost and score of one plan over the test rows; every stage that runs is paid."""
    assert test.confidence is not None
    columns = [test.experts.index(expert) for expert in option.experts]
    rules = [
        AcceptanceRule(threshold.accept_from, calibrations[expert], threshold.following)
        for expert, threshold in zip(option.experts, option.thresholds, strict=False)
    ]
    paid = served = 0.0
    for row in range(len(test)):
        before: float | None = None
        for place, column in enumerate(columns):
            paid += float(test.cost[row, column])
            if place == len(rules):
                break
            evidence = recorded_evidence(float(test.confidence[row, column]))
            told = rules[place].calibration.confidence(evidence)
            if told is not None and told >= rules[place].bound(before):
                break
            before = told
        served += float(test.score[row, column])
    return paid / len(test), served / len(test)


if __name__ == "__main__":
    main()
