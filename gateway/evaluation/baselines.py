"""What a router has to beat: chance, single experts, a category map, and two oracles."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gateway.evaluation.scored import Choice, Scored
from policies.mapping import map_within_average_cost

__all__ = ["baselines", "category_columns", "map_at_budget"]

IntArray = NDArray[np.int64]
_TIE = 1e-9


def baselines(scored: Scored) -> dict[str, Choice | None]:
    """Each by name; those that need the queries' true categories are None without any.

    ``domain_map``: each category's best expert by the training rows, under true categories.
    ``category_oracle``: the same by the held-out rows themselves. ``query_oracle``: the best expert
    of every query, of equals the cheapest.
    """
    outcomes, known = scored.outcomes, scored.known
    n = len(scored)
    domain = category_columns(scored, known.quality.argmax(axis=1).astype(np.int64))
    best = outcomes.score.max(axis=1, keepdims=True)
    tied = np.where(outcomes.score >= best - _TIE, outcomes.cost, np.inf)
    return {
        "random": Choice(outcomes.score.mean(axis=1), outcomes.cost.mean(axis=1)),
        "cheapest": Choice.of(outcomes, np.full(n, known.cheapest)),
        "best_single": Choice.of(outcomes, np.full(n, known.best_single)),
        "domain_map": None if domain is None else Choice.of(outcomes, domain),
        "category_oracle": _category_oracle(scored),
        "query_oracle": Choice.of(outcomes, tied.argmin(axis=1)),
    }


def category_columns(scored: Scored, expert: IntArray) -> IntArray | None:
    """[n] columns of a map [c], looked up by the queries' true categories; strangers get the best
    single expert."""
    labels = scored.outcomes.categories
    if labels is None or not set(labels) & set(scored.known.categories):
        return None
    at = [scored.known.categories.get(label) for label in labels]
    single = scored.known.best_single
    return np.array([single if c is None else int(expert[c]) for c in at], dtype=np.int64)


def map_at_budget(scored: Scored, budget: float) -> Choice | None:
    """The category map by mixed-integer program on the training tables; true categories.

    None where there are no categories or the budget is below the cheapest map.
    """
    known = scored.known
    weights = np.maximum(known.rows, 1e-9)
    if float((weights / weights.sum()) @ known.cost.min(axis=1)) > budget:
        return None
    solved = map_within_average_cost(known.quality, known.cost, weights, budget)
    columns = category_columns(scored, solved.expert)
    return None if columns is None else Choice.of(scored.outcomes, columns)


def _category_oracle(scored: Scored) -> Choice | None:
    labels = scored.outcomes.categories
    if labels is None:
        return None
    names, index = np.unique(np.array(labels), return_inverse=True)
    sums = np.zeros((len(names), scored.outcomes.score.shape[1]))
    np.add.at(sums, index, scored.outcomes.score)
    return Choice.of(scored.outcomes, sums.argmax(axis=1)[index])
