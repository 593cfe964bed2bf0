"""Trains and scores the router on every data set of a folder, over several splits.

Prints mean and range over splits of what each set is judged by, beside its baselines: also a kNN
and a logistic router on the same rows. ``--learning-curve`` trains on parts of the training rows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench._plain_routers import plain_routers
from bench._pooled import pooled_interval
from bench._report import write
from gateway.evaluation.baselines import baselines
from gateway.evaluation.evaluate import EvaluateOptions, Evaluation, evaluate
from gateway.evaluation.measure import (
    apgr_gain,
    auc_gain,
    domain_preference,
    preference,
    router_figures,
)
from gateway.evaluation.scored import Choice, Scored, routed
from policies.frontier import best_corner
from routers.embedder import DEFAULT_EMBEDDER, Embedder, load_embedder
from routers.outcome_train import ROWS_MIN
from routers.outcomes import Outcomes, holds_outcomes, read_outcomes, text_keys

_SHARES: Final = (0.125, 0.25, 0.5)
_RIVALS: Final = ("routing_alone", "threshold_cascade", "zero_router")
_LEARNED: Final = (
    "router_minus_best_single",
    "router_minus_zero_router_auc",
    "apgr",
    "domain_map_apgr",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of data-set folders")
    parser.add_argument("--sets", default="", help="names, separated by commas (default: all)")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--holdout", type=float, default=0.3)
    parser.add_argument("--budgets", default="", help="as in 31,54")
    parser.add_argument("--embedder", default=DEFAULT_EMBEDDER)
    parser.add_argument("--drop-conflicts", action="store_true", help="as in coe evaluate")
    parser.add_argument(
        "--learning-curve", action="store_true", help="12.5, 25, 50, 100 %% of rows"
    )
    parser.add_argument("--json", metavar="FILE", help="write the result here; - for stdout")
    options = parser.parse_args()
    wanted = set(filter(None, options.sets.split(",")))
    folders = [f for f in sorted(options.data.iterdir()) if holds_outcomes(f)]
    embedder = Remembering(load_embedder(options.embedder))
    result = {
        f.name: over_splits(f, options, embedder) for f in folders if not wanted or f.name in wanted
    }
    for name, figures in result.items():
        show(name, figures)
    write({"sets": result, "splits": options.splits, "holdout": options.holdout}, options.json)


class Remembering:
    """An embedder that runs its model once per text: splits share most of their prompts."""

    def __init__(self, embedder: Embedder) -> None:
        self.id, self.digest, self.dimensions = embedder.id, embedder.digest, embedder.dimensions
        self._embedder = embedder
        self._known: dict[str, NDArray[np.float32]] = {}

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        fresh = [text for text in dict.fromkeys(texts) if text not in self._known]
        if fresh:
            self._known.update(zip(fresh, self._embedder.embed(fresh), strict=True))
        return np.stack([self._known[text] for text in texts])


def over_splits(folder: Path, options: argparse.Namespace, embedder: Embedder) -> dict[str, Any]:
    """Every split's full result, the figures' mean and range, and intervals over the splits."""
    data = read_outcomes(folder)
    rows = (1 - options.holdout) * len(data)
    parts = [share for share in _SHARES if share * rows > ROWS_MIN]
    shares = (*parts, 1.0) if options.learning_curve else (1.0,)
    curve: dict[float, list[dict[str, float | None]]] = {share: [] for share in shares}
    runs, splits, rivals = [], [], []
    for seed in range(options.splits):
        for share in shares:
            print(
                f"{folder.name}: split {seed + 1} of {options.splits}, {100 * share:g} % of the "
                "training rows",
                file=sys.stderr,
                flush=True,
            )
            found = evaluated(folder, options, seed, share, embedder)
            row = summary(found.result)
            if share == 1.0:
                others = plain(data, found.scored, embedder)
                row |= plain_figures(others, seed)
                runs.append(found.result)
                splits.append(found.scored)
                rivals.append(others)
            curve[share].append(row)
    return {
        "figures": over(curve[1.0]),
        "pooled": pooled(splits, rivals),
        "learning_curve": {f"{share:g}": learned(rows) for share, rows in curve.items()},
        "runs": runs,
    }


def evaluated(
    folder: Path, options: argparse.Namespace, seed: int, share: float, embedder: Embedder
) -> Evaluation:
    choice = EvaluateOptions(
        folder,
        train=folder,
        budgets=tuple(float(b) for b in options.budgets.split(",") if b),
        holdout=options.holdout,
        drop_conflicts=options.drop_conflicts,
        seed=seed,
        train_share=share,
    )
    found = evaluate(choice, lambda *_: None, embedder)
    del found.result["latency_ms"]  # embeddings are remembered: this would time a dictionary
    return found


def plain(data: Outcomes, scored: Scored, embedder: Embedder) -> dict[str, Scored]:
    """kNN and logistic routers, trained on the rows that the router was trained on."""
    text_of = dict(zip(map(int, text_keys(data.texts)), data.texts, strict=True))
    seen = [text_of[int(key)] for key in scored.known.evidence.keys]
    return plain_routers(scored, embedder.embed(seen), embedder.embed(scored.outcomes.texts))


# --- figures --------------------------------------------------------------------------------------


def summary(run: dict[str, Any]) -> dict[str, float | None]:
    """One split: router, baselines and their differences, as plain numbers."""
    base, router, cascade = run["baselines"], run["router"], run.get("cascade")
    single = base["best_single"]
    reached = router["cost_at_best_single_score"]
    domain, category = base["domain_map"], base["category_oracle"]
    figures: dict[str, float | None] = {
        "best_single": single["score"],
        "domain_map": domain and domain["score"],
        "category_oracle": category and category["score"],
        "query_oracle": base["query_oracle"]["score"],
        "router_best_score": router["best_score"],
        "router_minus_best_single": router["best_score"] - single["score"],
        "cost_share_at_best_single_score": reached and reached / single["cost"],
        "zero_router_auc": run["zero_router"]["auc"],
        "router_auc": router["auc"],
        "router_minus_zero_router_auc": router["auc"] - run["zero_router"]["auc"],
    }
    figures |= {name: router.get(name) for name in ("apgr", "cpt50", "cpt80", "domain_map_apgr")}
    if cascade is not None:
        figures |= cascade_figures(cascade)
        reached = cascade["cost_at_best_single_score"]
        figures["cascade[all]_cost_share_at_best_single_score"] = (
            reached and reached / single["cost"]
        )
        figures["cascade[all]_best_score_minus_best_single"] = (
            cascade["best_score"] - single["score"]
        )
    for budget, row in run["at_budget"].items():
        figures |= {
            f"at_{budget}_{name}": cell and cell["score"] for name, cell in sorted(row.items())
        }
        figures[f"at_{budget}_router_minus_zero"] = (
            row["router"]["score"] - row["zero_router"]["score"]
        )
    return figures


def cascade_figures(cascade: dict[str, Any]) -> dict[str, float | None]:
    """Areas of cascade routing and its rivals, its lead over each, and its score at half of the
    best single expert's cost less that expert's; over all and by task."""
    whole = {name: cascade[name]["auc"] for name in _RIVALS} | {"cascade_routing": cascade["auc"]}
    parts = {"all": (whole, cascade["at_half_cost_of_best_single"])}
    for task, row in cascade.get("tasks", {}).items():
        parts[task] = row["auc"], row["at_half_cost_of_best_single"]
    figures: dict[str, float | None] = {}
    for part, (areas, half) in parts.items():
        named = {f"{name}_auc": value for name, value in areas.items()}
        named |= {
            f"auc_minus_{rival}": areas["cascade_routing"] - areas[rival] for rival in _RIVALS
        }
        named["at_half_cost_minus_best_single"] = half["score_difference"]
        figures |= {f"cascade[{part}]_{name}": value for name, value in named.items()}
    return figures


def plain_figures(others: dict[str, Scored], seed: int) -> dict[str, float | None]:
    rows: dict[str, float | None] = {}
    for name, scored in others.items():
        found = router_figures(scored, seed)
        rows |= {f"{name}_{key}": found.get(key) for key in ("best_score", "auc", "apgr")}
    return rows


def over(rows: Sequence[dict[str, float | None]]) -> dict[str, dict[str, float]]:
    """Mean and range of each figure that every split has."""
    found = {}
    for name in rows[0]:
        values = [value for row in rows if (value := row.get(name)) is not None]
        if len(values) == len(rows):
            found[name] = {
                "mean": statistics.fmean(values),
                "low": min(values),
                "high": max(values),
            }
    return found


def learned(rows: Sequence[dict[str, float | None]]) -> dict[str, dict[str, float]]:
    return {
        name: figure
        for name, figure in over(rows).items()
        if name in _LEARNED or name.endswith("_router_minus_zero")
    }


# --- intervals over splits ------------------------------------------------------------------------


def pooled(splits: Sequence[Scored], rivals: Sequence[dict[str, Scored]]) -> dict[str, Any]:
    """Paired bootstrap over prompts of the mean over splits, see ``bench._pooled``."""
    keys = [text_keys(scored.outcomes.texts) for scored in splits]
    found = {}
    for name, figure in comparisons(splits[0]).items():
        figures = [figure(scored, others) for scored, others in zip(splits, rivals, strict=True)]
        found[name] = pooled_interval(figures, keys)
    return found


Draw = Callable[[NDArray[np.int64]], float]
Comparison = Callable[[Scored, dict[str, Scored]], Draw]


def comparisons(example: Scored) -> dict[str, Comparison]:
    """What is compared, by name, as a function of drawn rows."""
    named: dict[str, Comparison] = {
        "best_score_minus_best_single": lambda scored, _: mean_gain(
            scored, baselines(scored)["best_single"]
        ),
        "best_score_minus_knn": lambda scored, others: mean_gain(scored, best(others["knn"])),
        "best_score_minus_logistic": lambda scored, others: mean_gain(
            scored, best(others["logistic"])
        ),
        "auc_minus_zero_router": area_gain,
        "auc_minus_knn": lambda scored, others: area_gain(scored, others, "knn"),
        "auc_minus_logistic": lambda scored, others: area_gain(scored, others, "logistic"),
    }
    pair = len(example.outcomes.experts) == 2
    if pair:
        named |= {
            "apgr_minus_knn": lambda scored, others: order_gain(
                scored, preference(others["knn"])[0]
            ),
            "apgr_minus_logistic": lambda scored, others: order_gain(
                scored, preference(others["logistic"])[0]
            ),
        }
    if baselines(example)["domain_map"] is None:
        return named
    named["best_score_minus_domain_map"] = lambda scored, _: mean_gain(
        scored, baselines(scored)["domain_map"]
    )
    if pair:
        named["apgr_minus_domain_map"] = lambda scored, _: order_gain(
            scored, domain_preference(scored)
        )
    return named


def best(scored: Scored) -> Choice:
    return routed(scored, best_corner(scored.corners))


def mean_gain(scored: Scored, rival: Choice | None) -> Draw:
    assert rival is not None
    gain = best(scored).score - rival.score
    return lambda rows: float(gain[rows].mean())


def area_gain(scored: Scored, others: dict[str, Scored], rival: str = "") -> Draw:
    """Over the zero router, or over what ``rival`` has over it."""
    corners = [routed(scored, corner) for corner in scored.corners]
    other = others.get(rival)
    against = [] if other is None else [routed(other, corner) for corner in other.corners]

    def gain(rows: NDArray[np.int64]) -> float:
        weights = np.bincount(rows, minlength=len(scored)).astype(np.float64)
        ours = auc_gain(scored, corners, weights)
        return ours if other is None else ours - auc_gain(other, against, weights)

    return gain


def order_gain(scored: Scored, rival: NDArray[np.float64] | None) -> Draw:
    assert rival is not None
    return lambda rows: apgr_gain(scored, rival, rows, 0)


def show(name: str, found: dict[str, Any]) -> None:
    print(name)
    for figure, row in found["figures"].items():
        print(f"  {figure:<48}{row['mean']:>10.4f}  ({row['low']:.4f} to {row['high']:.4f})")
    for figure, row in found["pooled"].items():
        interval = f"({row['low']:+.4f} to {row['high']:+.4f})"
        print(f"  {figure:<48}{row['difference']:>+10.4f}  {interval}")
    for share, rows in found["learning_curve"].items():
        cells = ", ".join(f"{figure} {row['mean']:+.4f}" for figure, row in rows.items())
        print(f"  trained on {100 * float(share):g} %: {cells}")


if __name__ == "__main__":
    main()
