from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from policies.frontier import (
    Corner,
    best_corner,
    chosen,
    mix_for_budget,
    solve_frontier,
    upper_hull,
)


def _outcomes(n: int = 400) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    chance = np.array([0.4, 0.5, 0.8])
    return (rng.random((n, 3)) < chance).astype(float), np.tile([1.0, 5.0, 20.0], (n, 1))


def test_a_router_that_knows_nothing_is_the_hull_of_the_single_experts() -> None:
    score, cost = _outcomes()
    blind = np.tile(score.mean(axis=0), (len(score), 1))
    corners = solve_frontier(blind, cost, score, cost)
    singles = np.column_stack([cost.mean(axis=0), score.mean(axis=0)])
    assert [(c.cost, c.score) for c in corners] == [
        pytest.approx(tuple(singles[i])) for i in upper_hull(singles)
    ]


def test_misleading_estimates_never_fall_below_the_single_experts() -> None:
    score, cost = _outcomes()
    corners = solve_frontier(1.0 - score, cost, score, cost)
    singles = np.column_stack([cost.mean(axis=0), score.mean(axis=0)])
    hull = singles[upper_hull(singles)]
    for budget in np.linspace(1.0, 20.0, 20):
        mix = mix_for_budget(corners, budget)
        got = (1 - mix.share) * mix.cheap.score + mix.share * mix.dear.score
        assert got >= np.interp(budget, hull[:, 0], hull[:, 1]) - 1e-9


def test_a_mix_meets_its_budget_exactly_between_corners_and_never_exceeds_it() -> None:
    score, cost = _outcomes()
    corners = solve_frontier(np.tile(score.mean(axis=0), (len(score), 1)), cost, score, cost)
    mix = mix_for_budget(corners, 12.0)
    assert (1 - mix.share) * mix.cheap.cost + mix.share * mix.dear.cost == pytest.approx(12.0)
    assert mix_for_budget(corners, 1e9).dear == best_corner(corners)
    assert mix_for_budget(corners, 0.1).cheap.cost == pytest.approx(1.0)


def test_equal_values_go_to_the_cheaper_expert_whatever_its_column() -> None:
    corner = best_corner(
        solve_frontier(
            np.ones((3, 2)), np.array([[2.0, 1.0]] * 3), np.ones((3, 2)), np.ones((3, 2))
        )
    )
    if corner.expert is None:
        assert chosen(np.ones((3, 2)), np.array([[2.0, 1.0]] * 3), corner).tolist() == [1, 1, 1]
    else:
        assert corner.cost == 1.0


def test_foreknowledge_reaches_the_query_oracle() -> None:
    score, cost = _outcomes()
    best = best_corner(solve_frontier(score, cost, score, cost))
    assert best.score == pytest.approx(score.max(axis=1).mean())


def test_wrong_estimates_never_fall_below_the_category_map_at_any_budget() -> None:
    rng = np.random.default_rng(4)
    category = np.arange(600) % 2
    chance = np.array([[0.9, 0.2, 0.8], [0.1, 0.6, 0.8]])[category]
    score, cost = (rng.random((600, 3)) < chance).astype(float), np.tile([1.0, 2.0, 20.0], (600, 1))
    mapped = np.stack([score[category == c].mean(axis=0) for c in range(2)])[category]
    own = solve_frontier(mapped, cost, score, cost)
    corners = solve_frontier(1.0 - score, cost, score, cost, mapped)
    singles = solve_frontier(1.0 - score, cost, score, cost)
    for budget in np.linspace(1.0, 20.0, 20):
        assert _expected(corners, budget) >= _expected(own, budget) - 1e-9
    assert _expected(corners, 2.0) > _expected(singles, 2.0) + 0.1
    corner = next(corner for corner in corners if corner.mapped)
    columns = chosen(1.0 - score, cost, corner, mapped)
    assert score[np.arange(600), columns].mean() == pytest.approx(corner.score)
    with pytest.raises(ValueError, match="map"):
        chosen(1.0 - score, cost, corner)


def test_the_map_takes_over_for_a_proved_lead_only() -> None:
    """Expert 1 for all, against a map that takes expert 0 where that is right, and once wrongly."""

    def lead_of(rows: int) -> bool:
        score = np.tile([0.0, 1.0], (300, 1))
        score[:rows] = [1.0, 0.0]
        cost, quality = np.ones((300, 2)), np.tile([0.0, 1.0], (300, 1))
        mapped = quality.copy()
        mapped[: rows + 1] = [1.0, 0.0]
        corners = solve_frontier(quality, cost, score, cost, mapped)
        return any(corner.mapped for corner in corners)

    assert not lead_of(2)
    assert lead_of(20)


@pytest.mark.parametrize("seed", range(5))
def test_one_way_to_route_serves_all_budgets(seed: int) -> None:
    """A hull over all points would pick, per budget, the way that chance favoured there."""
    rng = np.random.default_rng(seed)
    score = (rng.random((300, 4)) < 0.5 + 0.1 * np.arange(4)).astype(float)
    cost = np.tile([1.0, 3.0, 9.0, 27.0], (300, 1))
    quality, mapped = (score + rng.normal(0, 0.8, score.shape) for _ in range(2))
    corners = solve_frontier(quality, cost, score, cost, mapped)
    assert len(corners) > 5
    assert len({corner.mapped for corner in corners if corner.expert is None}) == 1
    assert [corner.expert for corner in corners[:-1]] == [None] * (len(corners) - 1)
    costs = [corner.cost for corner in corners]
    assert costs == sorted(set(costs))
    assert best_corner(corners) == corners[-1]


def _expected(corners: Sequence[Corner], budget: float) -> float:
    mix = mix_for_budget(corners, budget)
    return (1 - mix.share) * mix.cheap.score + mix.share * mix.dear.score
