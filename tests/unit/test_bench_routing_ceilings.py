"""What a planted category is worth to a router that is told it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bench.routing_ceilings import ceilings, over_splits
from routers.outcomes import Outcomes


def _planted(n: int, seed: int, *, flip: bool = False) -> Outcomes:
    """Each category has its expert, right in nine of ten cases; b is better and dearer than a.

    Within a category the source says more: there, one source in two turns the experts round.
    """
    rng = np.random.default_rng(seed)
    names = [f"{seed} {i}" for i in range(n)]
    category, source = rng.integers(0, 2, n), rng.integers(0, 4, n)
    good = category ^ (source == 0) ^ flip
    chance = np.where(good[:, None] == np.arange(2), [0.9, 0.99], [0.3, 0.4])
    return Outcomes(
        "planted", tuple(names), tuple(names), tuple(names),
        tuple(f"c{c}" for c in category), tuple(f"s{s}" for s in source), ("a", "b"),
        (rng.random((n, 2)) < chance).astype(float), np.tile([1.0, 2.0], (n, 1)), None, "coins",
        0, "",
    )  # fmt: skip


def test_what_a_label_tells_is_found_and_the_finer_label_tells_more() -> None:
    found = ceilings(_planted(4000, 0), _planted(4000, 1), budgets=(1.5, 5.0))
    gain = {level: figures["best_score_minus_best_single"] for level, figures in found.items()}
    # b alone: .695. By category, three quarters of the rows: .796. By source, all: .945.
    assert gain["category map"] == pytest.approx(0.10, abs=0.02)
    assert gain["source map"] == pytest.approx(0.25, abs=0.02)
    for level in ("category", "source"):
        assert gain[f"{level} oracle"] >= gain[f"{level} map"] - 1e-12
    assert found["source map"]["labels"] == 8
    assert found["source map"]["apgr"] > found["category map"]["apgr"]
    assert found["source map"]["cpt50"] < found["category map"]["cpt50"]
    assert "at_5_minus_zero" not in found["category map"]  # dearer than every expert
    zero = (0.695 + 0.6) / 2
    assert found["category map"]["at_1.5_minus_zero"] == pytest.approx(0.796 - zero, abs=0.02)


def test_the_map_knows_training_rows_only_and_the_oracle_scored_rows_only() -> None:
    train, test = _planted(2000, 0), _planted(2000, 1, flip=True)
    found = ceilings(train, test, budgets=())
    assert found["category map"]["best_score_minus_best_single"] < -0.1
    assert found["category oracle"]["best_score_minus_best_single"] > 0.05


def test_data_without_categories_has_no_ceilings() -> None:
    bare = replace(_planted(400, 0), categories=None)
    assert over_splits(bare, 2, 0.3, ()) == {}
