"""An evaluation as one self-contained HTML page: curve, categories, reliability, worst regrets."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from gateway.evaluation.calibration import reliability
from gateway.evaluation.curve_metrics import upper_hull
from gateway.evaluation.evaluate import Evaluation
from gateway.evaluation.plots import Series, plot
from gateway.evaluation.scored import Scored, columns_at
from policies.frontier import best_corner

__all__ = ["html_report", "write_report"]

_STYLE: Final = """body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:
0 1rem;color:#222}table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.2rem .7rem;text-align
:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}svg text{font:12px
system-ui}pre{white-space:pre-wrap;background:#f6f6f6;padding:.6rem;max-height:14rem;overflow:auto}
"""
_WORST: Final = 15
_PROMPT_CHARS: Final = 1_500


def write_report(evaluation: Evaluation, folder: Path) -> Path:
    """One page in ``folder``, which is made if need be. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "evaluate.html"
    page.write_text(html_report(evaluation), encoding="utf-8")
    return page


def html_report(evaluation: Evaluation) -> str:
    """The whole page. It holds prompts: treat it as you treat the data."""
    result, scored = evaluation.result, evaluation.scored
    facts = (
        f"{result['n']} held-out queries, {len(result['experts'])} experts, "
        f"{result['training_rows']} training rows, seed {result['seed']}; "
        f"cost in {result['cost_unit']}"
    )
    parts = [
        f"<h1>{html.escape(result['dataset'])}</h1><p>{html.escape(facts)}</p>",
        "<h2>Cost and quality</h2>",
        _curve_plot(result, scored),
        _baseline_table(result),
        "<h2>By category</h2>",
        _category_table(scored),
        "<h2>Reliability</h2><p>Mean score of the queries whose estimate falls into each tenth. "
        "On the diagonal, estimates can be taken at their word.</p>",
        _reliability_plot(scored),
        "<h2>Worst regrets</h2><p>Where the router was surest of an expert that failed, while "
        "another one answered. Estimates are in brackets.</p>",
        _regrets(scored),
    ]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>coe evaluate: '
        f"{html.escape(result['dataset'])}</title><style>{_STYLE}</style><body>"
        f"{''.join(parts)}</body></html>\n"
    )


def _curve_plot(result: Mapping[str, Any], scored: Scored) -> str:
    cost = scored.outcomes.cost.mean(axis=0)
    score = scored.outcomes.score.mean(axis=0)
    hull = upper_hull(cost, score)
    cascade = result.get("cascade", {}).get("curve", [])
    oracles = {
        name: row
        for name, row in result["baselines"].items()
        if row is not None and name in ("domain_map", "category_oracle", "query_oracle")
    }
    series = [
        Series("router", [(p["cost"], p["score"]) for p in result["router"]["curve"]]),
        Series("cascade", [(p["cost"], p["score"]) for p in cascade]),
        Series("zero router (hull)", [(cost[i], score[i]) for i in hull], dashed=True),
        Series(
            "single experts",
            list(zip(cost, score, strict=True)),
            line=False,
            labels=scored.outcomes.experts,
        ),
        Series(
            "map and oracles",
            [(row["cost"], row["score"]) for row in oracles.values()],
            line=False,
            labels=[name.replace("_", " ") for name in oracles],
        ),
    ]
    return plot(series, f"mean cost per query, {result['cost_unit']}", "mean score")


def _baseline_table(result: Mapping[str, Any]) -> str:
    router = result["router"]
    rows = {
        **result["baselines"],
        "router_best_score": {"score": router["best_score"], "cost": router["best_score_cost"]},
    }
    cells = []
    for name, row in rows.items():
        if row is None:
            continue
        ci = result["ci95"].get(name)
        gain = f"{ci['difference']:+.4f} ({ci['low']:+.4f} to {ci['high']:+.4f})" if ci else ""
        cells.append([name.replace("_", " "), f"{row['score']:.4f}", f"{row['cost']:.4g}", gain])
    return _table(["", "score", "cost", "from best single, 95 %"], cells)


def _category_table(scored: Scored) -> str:
    """Per true category: every expert's score, the router's at its best, and the oracle's."""
    outcomes = scored.outcomes
    labels = np.array(outcomes.categories or scored.category)
    columns = columns_at(scored, best_corner(scored.corners))
    routed = outcomes.score[np.arange(len(scored)), columns]
    rows = []
    for name in sorted(set(labels)):
        inside = labels == name
        means = outcomes.score[inside].mean(axis=0)
        favourite = np.bincount(columns[inside], minlength=len(means)).argmax()
        rows.append(
            [
                name,
                str(int(inside.sum())),
                *(f"{mean:.3f}" for mean in means),
                f"{routed[inside].mean():.3f}",
                f"{outcomes.score[inside].max(axis=1).mean():.3f}",
                outcomes.experts[int(favourite)],
            ]
        )
    return _table(
        ["category", "queries", *outcomes.experts, "router", "query oracle", "router's favourite"],
        rows,
    )


def _reliability_plot(scored: Scored) -> str:
    series = [Series("perfect", [(0.0, 0.0), (1.0, 1.0)], dashed=True)]
    for k, name in enumerate(scored.outcomes.experts):
        bins = reliability(scored.quality[:, k], scored.outcomes.score[:, k])
        series.append(Series(name, [(b["estimated"], b["scored"]) for b in bins]))
    return plot(series, "estimated", "scored")


def _regrets(scored: Scored) -> str:
    outcomes = scored.outcomes
    columns = columns_at(scored, best_corner(scored.corners))
    rows = np.arange(len(scored))
    best = outcomes.score.argmax(axis=1)
    regret = outcomes.score[rows, best] - outcomes.score[rows, columns]
    lead = scored.quality[rows, columns] - scored.quality[rows, best]
    order = np.lexsort((outcomes.query_ids, -lead, -regret))[:_WORST]
    parts = []
    for i in order:
        if regret[i] <= 0:
            break
        took, better = int(columns[i]), int(best[i])
        parts.append(
            f"<p><b>{html.escape(outcomes.query_ids[i])}</b>: took "
            f"{html.escape(outcomes.experts[took])} ({scored.quality[i, took]:.2f}), which scored "
            f"{outcomes.score[i, took]:.2f}; {html.escape(outcomes.experts[better])} "
            f"({scored.quality[i, better]:.2f}) scored {outcomes.score[i, better]:.2f}</p>"
            f"<pre>{html.escape(outcomes.prompts[i][:_PROMPT_CHARS])}</pre>"
        )
    return "".join(parts) or "<p>None.</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{top}</tr>{body}</table>"
