"""From recorded outcomes to a policy: which expert serves which category within a budget. Pure.

The second step of a Composition of Experts (arXiv 2412.01868, section 3): the table of mean score
by category and expert, each cell shrunk by its count, solved as a mixed-integer program under a
bound on the mean cost of a query or on the parameters of all experts in use together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from experts.errors import ConfigError
from policies.mapping import (
    CategoryMap,
    best_map,
    category_table,
    map_within_average_cost,
    map_within_held_parameters,
)
from routers.outcomes import Outcomes
from routers.types import GENERAL

__all__ = ["Budget", "Solution", "policy_text", "solve_map"]

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Budget:
    """At most one of the two. ``mean_cost``: per query, in the data's unit. ``parameters``: of all
    experts that the map uses, together.
    """

    mean_cost: float | None = None
    parameters: float | None = None


@dataclass(frozen=True, slots=True)
class Solution:
    """A map and what was known: ``rows`` [c], shrunk ``quality`` and ``cost`` [c, k] per query,
    ``expert`` the column of each category. As recorded, not shrunk: ``score_and_cost`` of the map
    on the data's queries, ``singles`` [k, 2] each expert's mean score and cost.
    """

    categories: tuple[str, ...]
    experts: tuple[str, ...]
    rows: FloatArray
    quality: FloatArray
    cost: FloatArray
    map: CategoryMap
    singles: FloatArray
    score_and_cost: tuple[float, float]

    @property
    def routes(self) -> dict[str, str]:
        """Category -> expert."""
        chosen = (self.experts[int(k)] for k in self.map.expert)
        return dict(zip(self.categories, chosen, strict=True))

    @property
    def best_single(self) -> str:
        return self.experts[int(self.singles[:, 0].argmax())]

    @property
    def default(self) -> str:
        """Of the experts in use, whose category is the general one, else the best over all."""
        if GENERAL in self.routes:
            return self.routes[GENERAL]
        used = sorted({int(k) for k in self.map.expert})
        return self.experts[max(used, key=lambda k: self.singles[k, 0])]

    def as_json(self) -> dict[str, Any]:
        best = self.experts.index(self.best_single)
        return {
            "routes": self.routes,
            "default": self.default,
            "map": {"score": self.score_and_cost[0], "cost": self.score_and_cost[1]},
            "best_single": {
                "expert": self.best_single,
                "score": float(self.singles[best, 0]),
                "cost": float(self.singles[best, 1]),
            },
            "categories": [self._row(c) for c in range(len(self.categories))],
        }

    def _row(self, c: int) -> dict[str, Any]:
        k, best = int(self.map.expert[c]), int(self.quality[c].argmax())
        return {
            "category": self.categories[c],
            "rows": int(self.rows[c]),
            "expert": self.experts[k],
            "score": float(self.quality[c, k]),
            "cost": float(self.cost[c, k]),
            "best_expert": self.experts[best],
            "best_score": float(self.quality[c, best]),
        }


def solve_map(
    outcomes: Outcomes, budget: Budget, parameters: Mapping[str, int | None] | None = None
) -> Solution:
    """The best map of the data's categories to its experts within the budget.

    ``parameters`` by expert, for a budget on them. Raises ConfigError where the data has no
    categories, an expert's parameters are not known, or nothing fits the budget.
    """
    if outcomes.categories is None:
        raise ConfigError(
            outcomes.name, None, "category", "the data has no categories to map; add the column"
        )
    names = tuple(sorted(set(outcomes.categories)))
    labels = np.searchsorted(np.array(names), np.array(outcomes.categories)).astype(np.int64)
    quality, rows = category_table(labels, outcomes.score, len(names))
    cost, _ = category_table(labels, outcomes.cost, len(names))
    if budget.mean_cost is not None:
        found = map_within_average_cost(quality, cost, rows, budget.mean_cost)
    elif budget.parameters is not None:
        sizes = _sizes(outcomes.experts, parameters or {})
        found = map_within_held_parameters(quality, cost, rows, sizes, budget.parameters)
    else:
        found = best_map(quality, cost, rows)
    singles = np.stack([outcomes.score.mean(axis=0), outcomes.cost.mean(axis=0)], axis=1)
    query, column = np.arange(len(outcomes)), found.expert[labels]
    got = (
        float(outcomes.score[query, column].mean()),
        float(outcomes.cost[query, column].mean()),
    )
    return Solution(names, outcomes.experts, rows, quality, cost, found, singles, got)


def _sizes(experts: tuple[str, ...], parameters: Mapping[str, int | None]) -> FloatArray:
    unknown = [name for name in experts if not parameters.get(name)]
    if unknown:
        reason = f"not known of {', '.join(unknown)}; give `parameters: 7B` or the like in coe.yaml"
        raise ConfigError("coe.yaml", None, "parameters", reason)
    return np.array([float(parameters[name] or 0) for name in experts])


def policy_text(solution: Solution, *, cap_usd: float, description: str) -> str:
    """The policy as YAML; the general category is the default's, so it needs no line."""
    routes = {c: e for c, e in solution.routes.items() if c != GENERAL}
    policy = {
        "version": 1,
        "description": description,
        "routes": routes,
        "default": solution.default,
        "fallbacks": [solution.default],
        "caps": {"stages": 1, "cost_usd": cap_usd},
    }
    return yaml.safe_dump(policy, sort_keys=False, allow_unicode=True, width=100)
