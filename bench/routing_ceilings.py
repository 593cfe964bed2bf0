"""What a query's category is worth: routers that are told it, on the splits of routing_quality.

    python bench/routing_ceilings.py FOLDER [--splits 3] [--budgets 31,54] [--json FILE]

Two routers take the expert with the largest mean score less price times mean cost of the query's
true category: ``map`` by the means of the training rows, ``oracle`` by those of the scored rows
themselves. ``source`` tells them the finer label, where the data has one. No router that knows
prompts by their category only can pass the oracle, so what is above it takes signals within a
category; with unlimited training rows the map would get between the two, as the oracle also takes
luck for skill. Scores are from ``best_single``, areas and budgets from the hull of the single
experts (the zero router), in means over splits; budgets that no mix of them costs are left out.
Nothing is embedded or trained.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import _report
from gateway.evaluation.curve_metrics import area, upper_hull
from gateway.evaluation.evaluate import split_by_prompt
from gateway.evaluation.pair_metrics import apgr, call_performance_threshold, gap_recovered
from policies.frontier import Corner, chosen, mix_for_budget, solve_frontier
from policies.mapping import category_table
from routers.outcomes import Outcomes, holds_outcomes, read_outcomes

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of data-set folders")
    parser.add_argument("--sets", default="", help="names, separated by commas (default: all)")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--holdout", type=float, default=0.3)
    parser.add_argument("--budgets", default="", help="as in 31,54")
    parser.add_argument("--json", metavar="FILE", help="- for standard output")
    options = parser.parse_args()
    wanted = set(filter(None, options.sets.split(",")))
    budgets = tuple(float(budget) for budget in options.budgets.split(",") if budget)
    result = {
        folder.name: over_splits(read_outcomes(folder), options.splits, options.holdout, budgets)
        for folder in sorted(options.data.iterdir())
        if holds_outcomes(folder) and (not wanted or folder.name in wanted)
    }
    for name, levels in result.items():
        for level, figures in levels.items():
            cells = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
            print(f"{name:<22}{level:<18}{cells}")
    _report.write({"sets": result, "splits": options.splits}, options.json)


def over_splits(
    data: Outcomes, splits: int, holdout: float, budgets: Sequence[float]
) -> dict[str, Figures]:
    """By level (``category map`` to ``source oracle``), each figure's mean over splits."""
    rows: dict[str, list[Figures]] = {}
    for seed in range(splits):
        rest, held = split_by_prompt(data, holdout, seed)
        for level, figures in ceilings(data.rows(rest), data.rows(held), budgets).items():
            rows.setdefault(level, []).append(figures)
    return {level: mean_figures(found) for level, found in rows.items()}


def mean_figures(splits: Sequence[Figures]) -> Figures:
    """Of each figure that every split has."""
    shared = [key for key in splits[0] if all(key in row for row in splits)]
    return {key: float(np.mean([row[key] for row in splits])) for key in shared}


def ceilings(train: Outcomes, test: Outcomes, budgets: Sequence[float]) -> dict[str, Figures]:
    """One split; empty without categories."""
    found = {}
    for level, (known, asked) in labels_of(train, test).items():
        count = int(max(known.max(), asked.max())) + 1
        told = {
            "map": (known, train, [category_table(known, v, count)[0] for v in _cells(train)]),
            "oracle": (asked, test, [_means(asked, v, count) for v in _cells(test)]),
        }
        for kind, (labels, rows, (quality, cost)) in told.items():
            corners = solve_frontier(quality[labels], cost[labels], *_cells(rows))
            figures = figures_of(quality[asked], cost[asked], corners, train, test, budgets)
            found[f"{level} {kind}"] = {"labels": count, **figures}
    return found


def figures_of(
    quality: FloatArray,
    expected: FloatArray,
    corners: Sequence[Corner],
    train: Outcomes,
    test: Outcomes,
    budgets: Sequence[float],
    mapped: FloatArray | None = None,
) -> Figures:
    """``quality`` and ``expected`` cost [n, k] of the scored rows, routed at ``corners``.

    ``mapped`` [n, k], what the category map knows, where a corner may be of the map.
    """
    rows = np.arange(len(test))
    columns = [chosen(quality, expected, corner, mapped) for corner in corners]
    score = np.array([test.score[rows, c].mean() for c in columns])
    cost = np.array([test.cost[rows, c].mean() for c in columns])
    single = test.score[:, train.score.mean(axis=0).argmax()].mean()
    singles = test.cost.mean(axis=0), test.score.mean(axis=0)
    hull = upper_hull(*singles)
    zero = singles[0][hull], singles[1][hull]
    limits = float(singles[0].min()), float(singles[0].max())
    order = np.argsort(cost, kind="stable")
    best = int(np.argmax([corner.score for corner in corners]))
    found = {
        "best_score_minus_best_single": float(score[best] - single),
        "auc_minus_zero_router": area(cost[order], score[order], *limits) - area(*zero, *limits),
    }
    if len(test.experts) == 2:
        found |= _pair(quality, train, test)
    for budget in budgets:
        if not limits[0] <= budget <= limits[1]:
            continue
        mix = mix_for_budget(corners, budget)
        cheap, dear = corners.index(mix.cheap), corners.index(mix.dear)
        mixed = (1 - mix.share) * score[cheap] + mix.share * score[dear]
        found[f"at_{budget:g}_minus_zero"] = float(mixed - np.interp(budget, *zero))
    return found


def _pair(quality: FloatArray, train: Outcomes, test: Outcomes) -> Figures:
    """Of the order by the category's gap between the two experts; a threshold never reached is left
    out."""
    strong = int(train.score.mean(axis=0).argmax())
    gap, gain = (v[:, strong] - v[:, 1 - strong] for v in (quality, test.score))
    recovered = gap_recovered(gap, gain, 0)
    half = call_performance_threshold(recovered, 0.5)
    return {"apgr": apgr(recovered)} | ({} if half is None else {"cpt50": half})


def _cells(rows: Outcomes) -> tuple[FloatArray, FloatArray]:
    return rows.score, rows.cost


def _means(labels: IntArray, cells: FloatArray, count: int) -> FloatArray:
    """[count, k] plain means of [n, k] by label; 0 where a label has no row."""
    sums = np.zeros((count, cells.shape[1]))
    np.add.at(sums, labels, cells)
    means: FloatArray = sums / np.maximum(np.bincount(labels, minlength=count), 1)[:, None]
    return means


def labels_of(train: Outcomes, test: Outcomes) -> dict[str, tuple[IntArray, IntArray]]:
    """Numbers of the categories, and of the sources within them, of train and test."""
    if train.categories is None or test.categories is None:
        return {}
    names = {"category": [*train.categories, *test.categories]}
    if train.sources is not None and test.sources is not None:
        both = zip(names["category"], (*train.sources, *test.sources), strict=True)
        finer = [f"{category}\0{source}" for category, source in both]
        if len(set(finer)) > len(set(names["category"])):
            names["source"] = finer
    found = {}
    for level, labels in names.items():
        numbers = np.unique(np.array(labels), return_inverse=True)[1].astype(np.int64)
        found[level] = numbers[: len(train)], numbers[len(train) :]
    return found


if __name__ == "__main__":
    main()
