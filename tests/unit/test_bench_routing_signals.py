"""The measure of what a prompt tells: shares of variance that are planted are found again."""

from __future__ import annotations

import numpy as np
import pytest

from bench.routing_ceilings import mean_figures
from bench.routing_signals import _bettered, _weight, explained

RNG = np.random.default_rng(5)
SCORE = (RNG.random((6000, 4)) < [0.4, 0.5, 0.6, 0.7]).astype(float)
MEANS = SCORE.mean(axis=0)
FLAT = np.tile(MEANS, (len(SCORE), 1))


def test_means_explain_nothing_and_the_scores_themselves_everything() -> None:
    assert explained(FLAT, SCORE, MEANS) == 0.0
    assert explained(SCORE, SCORE, MEANS) == 1.0
    shifted = SCORE + RNG.random((len(SCORE), 1))
    assert explained(shifted, SCORE, MEANS) == pytest.approx(1.0)  # no route depends on it


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3])
def test_a_bettered_estimate_explains_the_share_that_was_asked_for(share: float) -> None:
    found = _bettered(FLAT, SCORE, share, np.random.default_rng(0))
    assert explained(found, SCORE, MEANS) == pytest.approx(share, abs=0.01)


def test_a_worse_estimate_gets_no_weight_and_a_better_one_does() -> None:
    noise = FLAT + RNG.normal(0, 0.3, SCORE.shape)
    assert _weight(FLAT, noise, SCORE) < 0.02
    better = _bettered(FLAT, SCORE, 0.2, np.random.default_rng(1))
    assert _weight(FLAT, better, SCORE) == pytest.approx(1.0, abs=0.1)


def test_an_opinion_that_a_split_did_not_admit_has_no_mean() -> None:
    assert mean_figures([{"router": 0.2, "trees": 0.1}, {"router": 0.4}]) == {
        "router": pytest.approx(0.3)
    }
