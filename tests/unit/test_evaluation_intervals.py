"""Intervals, the pair's figures of a curve, and what a cascade's JSON says of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gateway.evaluation.cascade import CascadeData, estimates_of, evaluate_cascade
from gateway.evaluation.intervals import resampled, resampled_mean, resampled_rows
from gateway.evaluation.pair_metrics import pair_curve_figures


def test_the_interval_of_a_mean_is_the_textbooks() -> None:
    gain = np.random.default_rng(3).normal(0.05, 1.0, 900)
    found = resampled_mean(gain, seed=0)
    half = 1.96 * gain.std() / 30
    assert found["difference"] == pytest.approx(gain.mean())
    assert found["low"] == pytest.approx(gain.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(gain.mean() + half, abs=0.1 * half)


def test_rows_and_weights_are_the_same_draws() -> None:
    gain = np.random.default_rng(4).normal(size=200)
    weighed = resampled(lambda w: float(np.average(gain, weights=w)), 200, 7, resamples=2000)
    for key, value in resampled_mean(gain, seed=7).items():
        assert weighed[key] == pytest.approx(value, abs=1e-12)


def test_draws_without_a_value_are_left_out() -> None:
    found = resampled_rows(lambda rows: float("nan") if rows[0] % 2 else 1.0, 11, 0)
    assert (found["low"], found["high"]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("calls", "score", "figures"),
    [
        ([0.5], [0.65], {"apgr": 0.5, "cpt50": 50.0, "cpt80": 80.0}),  # a coin
        ([0.2], [0.8], {"apgr": 0.9, "cpt50": 10.0, "cpt80": 16.0}),  # all of the gap with a fifth
        ([0.8, 0.4], [0.8, 0.8], {"apgr": 0.8, "cpt50": 20.0, "cpt80": 32.0}),  # in any order
        ([], [], {"apgr": 0.5, "cpt50": 50.0, "cpt80": 80.0}),
    ],
)
def test_a_curve_over_strong_calls_has_the_pairs_figures(
    calls: list[float], score: list[float], figures: dict[str, float]
) -> None:
    found = pair_curve_figures(np.array(calls), np.array(score), weak=0.5, strong=0.8)
    assert found == pytest.approx(figures)


def test_experts_that_score_the_same_have_no_gap_to_recover() -> None:
    found = pair_curve_figures(np.array([0.5]), np.array([0.7]), weak=0.6, strong=0.6)
    assert found == {"apgr": None, "cpt50": None, "cpt80": None}


def _pair(n: int = 500) -> CascadeData:
    """The cheap expert knows when it is wrong; before its answer nothing is known."""
    rng = np.random.default_rng(2)

    def draw() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        chance = np.hstack([rng.choice([0.05, 0.95], (n, 1)), np.full((n, 1), 0.9)])
        score = (rng.random((n, 2)) < chance).astype(float)
        cost = np.tile([1.0, 10.0], (n, 1))
        return score, cost, np.log(chance), np.tile([0.5, 0.9], (n, 1))

    both = [part for columns in zip(draw(), draw(), strict=True) for part in columns]
    return CascadeData(("weak", "strong"), *both, seed=0)


def test_a_cascade_of_two_is_judged_by_its_strong_calls_and_from_the_best_single() -> None:
    result = evaluate_cascade(_pair())
    found, ci95 = result.as_json(resamples=100), result.from_best_single(resamples=100)
    # Half of the drafts are known to be wrong; calling for those alone gains .425, the gap is .4.
    assert found["apgr"] == pytest.approx(0.78, abs=0.03)
    assert found["cpt50"] == pytest.approx(23.5, abs=2.5)
    half, best = ci95["cascade_at_half_cost_of_best_single"], ci95["cascade_best_score"]
    assert half["difference"] == pytest.approx(
        found["at_half_cost_of_best_single"]["score_difference"]
    )
    single = result.singles.score[1].mean()
    assert best["difference"] == pytest.approx(found["best_score"] - single)
    for interval in (*ci95.values(), *found["ci95"].values()):
        assert set(interval) == {"difference", "low", "high"}
        assert interval["low"] <= interval["difference"] <= interval["high"]
    over = result.area_over(lambda _: found["auc"], resamples=20)
    assert over["difference"] == pytest.approx(0.0, abs=1e-12)


def test_an_answer_without_a_confidence_is_a_usual_one_not_a_sure_one() -> None:
    data = _pair()
    confidence = data.confidence_test.copy()
    confidence[0, 0], confidence[1, 0] = np.nan, 0.0
    confidence[2, 0] = np.median(data.confidence_train[:, 0])
    after = estimates_of(replace(data, confidence_test=confidence))[1].after
    assert after[0, 0] == pytest.approx(after[2, 0])
    assert after[0, 0] < after[1, 0]
    silent = data.confidence_train.copy()
    silent[:, 0] = np.nan
    mute = replace(data, confidence_train=silent, confidence_test=np.full_like(confidence, np.nan))
    assert estimates_of(mute)[1].after[:, 0] == pytest.approx(0.5, abs=0.06)
