"""In which categories a second answer pays, by training rows; plain routing is the other case."""

from __future__ import annotations

from typing import Final

import numpy as np

from gateway.evaluation.cascade_replay import Estimates, Recorded, prices_of, replay
from policies.cascade_routing import Search
from policies.post_answer import FloatArray

__all__ = ["stages_by_category"]

_ERRORS: Final = 0.5


def stages_by_category(
    recorded: Recorded, known: Estimates, stages_max: int, search: Search
) -> dict[str, int]:
    """1 for each category whose rows count against further answers, ``stages_max`` for the others.

    They do where cascading earns less than routing alone, in mean value over prices, by more than
    half a standard error: what the joint estimates promise stands until rows contradict it. Where
    the cheap experts are right nearly always, an answer's confidence can mislead more than it
    tells. The estimates must be out-of-fold.
    """
    names = np.array(known.categories)
    found = {}
    for name in sorted(set(known.categories)):
        at = np.flatnonzero(names == name).astype(np.int64)
        rows, estimates = recorded.rows(at), known.rows(at)
        gained = _value(rows, estimates, stages_max, search) - _value(rows, estimates, 1, search)
        error = float(gained.std()) / np.sqrt(len(gained))
        found[name] = 1 if gained.mean() < -_ERRORS * error else stages_max
    return found


def _value(recorded: Recorded, known: Estimates, stages: int, search: Search) -> FloatArray:
    """(n,) mean over prices of score less price times cost, on one scale, as for a frontier."""
    span = float(np.ptp(recorded.cost.mean(axis=0)))
    total = np.zeros(len(recorded.score))
    prices = prices_of(known.cost)
    for price in prices:
        run = replay(recorded, known, float(price), stages_max=stages, search=search)
        total += (run.score - price * run.cost) / (1.0 + price * span)
    value: FloatArray = total / len(prices)
    return value
