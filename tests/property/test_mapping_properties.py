from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import ConfigError
from policies.mapping import (
    best_map,
    map_within_average_cost,
    map_within_held_parameters,
    shrunk,
)

_CATEGORIES, _EXPERTS = 3, 3
_cells = st.lists(
    st.integers(0, 100), min_size=_CATEGORIES * _EXPERTS, max_size=_CATEGORIES * _EXPERTS
)
_weights = st.lists(st.integers(1, 50), min_size=_CATEGORIES, max_size=_CATEGORIES)


def _tables(quality: list[int], cost: list[int], weights: list[int]) -> tuple[np.ndarray, ...]:
    shape = (_CATEGORIES, _EXPERTS)
    return (
        np.array(quality, float).reshape(shape) / 100,
        np.array(cost, float).reshape(shape),
        np.array(weights, float),
    )


@settings(max_examples=40, deadline=None)
@given(_cells, _cells, _weights, st.integers(0, 100))
def test_average_cost_map_equals_exhaustive_search(
    quality: list[int], cost: list[int], weights: list[int], budget: int
) -> None:
    q, c, w = _tables(quality, cost, weights)
    share, rows = w / w.sum(), np.arange(_CATEGORIES)
    maps = [np.array(m) for m in product(range(_EXPERTS), repeat=_CATEGORIES)]
    fitting = [m for m in maps if share @ c[rows, m] <= budget + 1e-9]
    if not fitting:
        with pytest.raises(ConfigError, match="below the least cost"):
            map_within_average_cost(q, c, w, float(budget))
        return
    found = map_within_average_cost(q, c, w, float(budget) + 1e-6)
    assert found.cost <= budget + 1e-5
    assert found.quality == pytest.approx(max(share @ q[rows, m] for m in fitting), abs=2e-5)


@settings(max_examples=40, deadline=None)
@given(_cells, _weights, st.integers(10, 60))
def test_held_parameters_map_equals_exhaustive_search(
    quality: list[int], weights: list[int], budget: int
) -> None:
    q, c, w = _tables(quality, [0] * 9, weights)
    size = np.array([7.0, 20.0, 31.0])
    share, rows = w / w.sum(), np.arange(_CATEGORIES)
    maps = [np.array(m) for m in product(range(_EXPERTS), repeat=_CATEGORIES)]
    best = max(share @ q[rows, m] for m in maps if size[np.unique(m)].sum() <= budget)
    found = map_within_held_parameters(q, c, w, size, float(budget))
    assert size[np.unique(found.expert)].sum() <= budget
    assert found.quality == pytest.approx(best, abs=2e-5)


def test_a_small_cell_cannot_win_by_luck() -> None:
    means, counts = np.array([[0.6, 0.7], [1.0, 0.0]]), np.array([1000.0, 1.0])
    assert best_map(means, np.ones((2, 2)), counts).expert.tolist() == [1, 0]
    assert best_map(shrunk(means, counts), np.ones((2, 2)), counts).expert.tolist() == [1, 1]
