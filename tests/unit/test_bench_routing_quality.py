"""What the routing benchmark adds: rival routers on the same rows, intervals over splits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from bench._plain_routers import plain_routers
from bench._pooled import pooled_interval
from bench.routing_quality import Remembering, cascade_figures, over
from gateway.evaluation.scored import Known, Scored
from policies.frontier import best_corner, chosen, solve_frontier
from routers.outcomes import Outcomes, text_keys
from routers.quality_record import Evidence


def _outcomes(texts: Sequence[str], score: np.ndarray) -> Outcomes:
    n = len(texts)
    names = tuple(texts)
    return Outcomes(
        "planted", names, names, names, None, None, ("a", "b"), score, np.ones((n, 2)), None,
        "coins", 0, "",
    )  # fmt: skip


def _planted(n: int = 200) -> tuple[Scored, np.ndarray, np.ndarray]:
    """Expert a is right on one half of the plane, b on the other, as far as luck allows."""
    rng = np.random.default_rng(0)

    def side(rows: int) -> tuple[np.ndarray, np.ndarray]:
        vectors = rng.normal(size=(rows, 8)).astype(np.float32)
        chance = 1 / (1 + np.exp(-4 * vectors[:, :1]))
        right = rng.random((rows, 2)) < np.hstack([chance, 1 - chance])
        return vectors, right.astype(np.float64)

    (known, score), (held, truth) = side(n), side(n)
    texts = [f"known {i}" for i in range(n)]
    flat = np.full((n, 2), 0.5)
    labels = np.zeros(n, dtype=np.int64)
    evidence = Evidence(score, np.ones((n, 2)), flat, flat, np.ones((n, 2)), labels,
                        text_keys(texts))  # fmt: skip
    corners = solve_frontier(flat, np.ones((n, 2)), score, np.ones((n, 2)))
    test = _outcomes([f"held {i}" for i in range(n)], truth)
    blank = Scored(test, Known.of(evidence, ("all",)), flat, flat, np.ones((n, 2)), ("all",) * n,
                   corners)  # fmt: skip
    return blank, known, held


def test_neighbours_and_logistic_find_what_the_embedding_shows() -> None:
    scored, known, held = _planted()
    truth = scored.outcomes.score
    for name, found in plain_routers(scored, known, held).items():
        columns = chosen(found.quality, found.expected_cost, best_corner(found.corners))
        reached = truth[np.arange(len(truth)), columns].mean()
        assert reached > truth.mean(axis=0).max() + 0.15, name


def test_splits_of_the_same_prompts_are_not_independent() -> None:
    gain = np.random.default_rng(1).normal(0.1, 1.0, 400)
    keys = np.arange(400, dtype=np.uint64)
    figure = lambda rows: float(gain[rows].mean())  # noqa: E731
    one = pooled_interval([figure], [keys])
    thrice = pooled_interval([figure] * 3, [keys] * 3)
    apart = [keys + np.uint64(400 * i) for i in range(3)]
    wider = pooled_interval([figure] * 3, apart)
    assert one["difference"] == pytest.approx(gain.mean())
    assert thrice["high"] - thrice["low"] == pytest.approx(one["high"] - one["low"], rel=0.1)
    assert wider["high"] - wider["low"] < 0.75 * (one["high"] - one["low"])
    assert (thrice["prompts"], wider["prompts"]) == (400, 1200)


def test_a_text_is_embedded_once() -> None:
    class Counting:
        id, digest, dimensions = "counting", "0", 1
        seen = 0

        def embed(self, texts: Sequence[str]) -> np.ndarray:
            self.seen += len(texts)
            return np.array([[float(len(text))] for text in texts], dtype=np.float32)

    inner = Counting()
    embedder = Remembering(inner)
    embedder.embed(["one", "three", "one"])
    assert embedder.embed(["three", "sixteen"])[:, 0].tolist() == [5.0, 7.0]
    assert inner.seen == 3


def test_figures_that_a_split_lacks_are_left_out() -> None:
    found = over([{"a": 1.0, "b": None}, {"a": 3.0, "b": 2.0}])
    assert found == {"a": {"mean": 2.0, "low": 1.0, "high": 3.0}}


def test_a_cascades_leads_are_shown_over_all_and_by_task() -> None:
    areas = {"routing_alone": 0.7, "threshold_cascade": 0.6, "zero_router": 0.5}
    cascade = {
        "auc": 0.75,
        **{name: {"auc": value} for name, value in areas.items()},
        "at_half_cost_of_best_single": {"score_difference": 0.02},
        "tasks": {
            "sums": {
                "auc": {**areas, "cascade_routing": 0.65},
                "at_half_cost_of_best_single": {"score_difference": -0.01},
            }
        },
    }
    found = cascade_figures(cascade)
    assert found["cascade[all]_auc_minus_routing_alone"] == pytest.approx(0.05)
    assert found["cascade[sums]_auc_minus_routing_alone"] == pytest.approx(-0.05)
    assert found["cascade[sums]_auc_minus_zero_router"] == pytest.approx(0.15)
    assert found["cascade[sums]_at_half_cost_minus_best_single"] == -0.01
