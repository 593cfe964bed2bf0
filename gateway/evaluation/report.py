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
0 1rem;color:#222}div.wide{overflow-x:auto}table{border-collapse:collapse;margin:.5rem 0}td,th{
padding:.2rem .7rem;text-align:right;border-bottom:1px solid #ddd;white-space:nowrap}td:first-child,
th:first-child{text-align:left}svg text{font:12px system-ui,sans-serif;
paint-order:stroke;stroke:#fff;stroke-width:3px}figure{display:inline-block;
margin:0 .5rem .5rem 0}figcaption{font-size:13px}pre{white-space:pre-wrap;background:#f6f6f6;padding
:.6rem;max-height:14rem;overflow:auto}
"""
_OWN_ROWS: Final = {"router_best_score": "router", "cascade_best_score": "cascade"}
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
        f"cost unit: {result['cost_unit']}"
    )
    parts = [
        f"<h1>{html.escape(result['dataset'])}</h1><p>{html.escape(facts)}</p>",
        "<h2>Cost and quality</h2>",
        _curve_plot(result, scored),
        _baseline_table(result),
        _figures_table(result),
        _budget_table(result),
        "<h2>By category</h2><p>Mean score of every expert, of the router at its best, and of the "
        "expert that is best in the category and for each query by these queries themselves.</p>",
        _category_table(scored),
        _cascade_table(result),
        "<h2>Reliability</h2><p>Mean score of the queries whose estimate falls into each tenth; "
        "the larger the dot, the more queries. On the diagonal, estimates can be taken at their "
        "word. ECE is the mean distance from it.</p>",
        _reliability_plots(result, scored),
        "<h2>Worst regrets</h2><p>Where the router was surest of an expert that failed, while "
        "another one did not. Estimates are in brackets.</p>",
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
    own = {
        name: {"score": result[key]["best_score"], "cost": result[key]["best_score_cost"]}
        for name, key in _OWN_ROWS.items()
        if key in result
    }
    cells = [
        [_words(name), f"{row['score']:.4f}", f"{row['cost']:.4g}", _interval(result, name)]
        for name, row in (result["baselines"] | own).items()
        if row is not None
    ]
    return _table(["", "score", "cost", "from best single, 95 %"], cells)


def _figures_table(result: Mapping[str, Any]) -> str:
    """What describes a whole curve, for every method that has one."""
    cascade = result.get("cascade", {})
    methods = {
        "router": result["router"],
        "zero router": result["zero_router"],
        "cascade": cascade,
        "threshold cascade": cascade.get("threshold_cascade"),
    }
    heads = {
        "auc": "area",
        "aiq": "AIQ",
        "cost_at_best_single_score": "cost at best single's score",
        "apgr": "APGR",
        "cpt50": "CPT50, %",
        "cpt80": "CPT80, %",
    }
    kept = [key for key in heads if key in result["router"]]
    rows = [
        [name, *(_cell(key, found) for key in kept)] for name, found in methods.items() if found
    ]
    return _table(["", *(heads[key] for key in kept)], rows)


def _cell(key: str, found: Mapping[str, Any]) -> str:
    """A figure, ``never`` for one that the curve does not reach, nothing where there is none."""
    if key not in found:
        return ""
    return "never" if found[key] is None else f"{found[key]:.4g}"


def _budget_table(result: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{budget}: {_words(name)}",
            f"{row['score']:.4f}",
            f"{row['cost']:.4g}",
            _interval(result, f"{name}_at_{budget}"),
            _interval(result, f"router_at_{budget}_minus_{name}"),
        ]
        for budget, ways in result["at_budget"].items()
        for name, row in ways.items()
        if row is not None
    ]
    head = ["at a budget of", "score", "cost", "from best single, 95 %", "router from it, 95 %"]
    return _table(head, rows) if rows else ""


def _interval(result: Mapping[str, Any], name: str) -> str:
    found = result["ci95"].get(name)
    if found is None:
        return ""
    return f"{found['difference']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def _words(name: str) -> str:
    return name.replace("_", " ")


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
                f"{routed[inside].mean():.3f}",
                outcomes.experts[int(favourite)],
                f"{means.max():.3f}",
                f"{outcomes.score[inside].max(axis=1).mean():.3f}",
                *(f"{mean:.3f}" for mean in means),
            ]
        )
    return _table(
        [
            "category",
            "queries",
            "router",
            "router's favourite",
            "category oracle",
            "query oracle",
            *outcomes.experts,
        ],
        rows,
    )


def _cascade_table(result: Mapping[str, Any]) -> str:
    """Areas of cascade routing and of what it has to beat, category by category."""
    tasks = result.get("cascade", {}).get("tasks", {})
    if not tasks:
        return ""
    rivals = ("routing_alone", "threshold_cascade", "zero_router")
    rows = []
    for name, task in tasks.items():
        cells = [name, str(task["n"]), f"{task['auc']['cascade_routing']:.4f}"]
        for rival in rivals:
            ci = task["ci95"][f"auc_minus_{rival}"]
            cells.append(f"{task['auc'][rival]:.4f} ({ci['low']:+.4f} to {ci['high']:+.4f})")
        rows.append(cells)
    title = (
        "<p>Areas of each category alone; in brackets, by how much cascade routing is ahead, 95 %."
        "</p>"
    )
    head = ["category", "queries", "cascade routing", *map(_words, rivals)]
    return title + _table(head, rows)


def _reliability_plots(result: Mapping[str, Any], scored: Scored) -> str:
    """One small diagram per expert."""
    diagonal = Series("", [(0.0, 0.0), (1.0, 1.0)], dashed=True)
    parts = []
    for k, name in enumerate(scored.outcomes.experts):
        bins = reliability(scored.quality[:, k], scored.outcomes.score[:, k])
        dots = Series(
            "",
            [(b["estimated"], b["scored"]) for b in bins],
            line=False,
            radii=[2.0 + 10.0 * float(np.sqrt(b["share"])) for b in bins],
        )
        drawn = plot([diagonal, dots], "estimated", "scored", size=(300, 240), limits=(0.0, 1.0))
        found = result["calibration"][name]
        caption = f"{name}: ECE {found['ece']:.3f}, Brier {found['brier']:.3f}"
        parts.append(f"<figure>{drawn}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return "".join(parts)


def _regrets(scored: Scored) -> str:
    outcomes = scored.outcomes
    columns = columns_at(scored, best_corner(scored.corners))
    rows = np.arange(len(scored))
    top = outcomes.score >= outcomes.score.max(axis=1, keepdims=True)
    best = np.where(top, scored.quality, -1.0).argmax(axis=1)
    regret = outcomes.score[rows, best] - outcomes.score[rows, columns]
    order = np.lexsort((outcomes.query_ids, -scored.quality[rows, columns], -regret))[:_WORST]
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
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'
