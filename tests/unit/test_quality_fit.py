"""How far estimates may leave the category table, and how strongly the table is shrunk."""

from __future__ import annotations

import numpy as np
import pytest

from routers.features import hashed
from routers.quality import contrasts
from routers.quality_blend import blended, fit_recalibration
from routers.quality_fit import _table
from routers.quality_sample import OutcomeSample, QualitySettings

_N, _K = 1200, 3


def _sample(chance: np.ndarray, parent: np.ndarray, labels: np.ndarray) -> OutcomeSample:
    rng = np.random.default_rng(2)
    return OutcomeSample(
        vectors=np.zeros((_N, 2), np.float16),
        texts=(hashed(""),) * _N,
        signs=np.zeros((_N, 1)),
        labels=labels,
        groups=np.arange(_N),
        parent=parent,
        experts=("a", "b", "c"),
        score=(rng.random((_N, _K)) < chance).astype(float),
        cost=np.ones((_N, _K)),
        references=np.arange(_N),
    )


def _even(centre: np.ndarray) -> OutcomeSample:
    return _sample(np.tile(centre, (_N, 1)), np.zeros(1, np.int64), np.zeros(_N, np.int64))


def _blend_with(opinion: np.ndarray, sample: OutcomeSample) -> tuple[float, float]:
    mean = sample.score.mean(axis=0)
    held = {"table": np.tile(mean, (_N, 1)), "trees": opinion}
    found = blended(held, sample, mean, QualitySettings())
    return found.share, found.gain[0]


def test_an_opinion_that_knows_something_is_followed_and_one_that_knows_nothing_is_not() -> None:
    rng = np.random.default_rng(3)
    chance = rng.uniform(0.2, 0.8, (_N, _K))
    known = _sample(chance, np.zeros(1, np.int64), np.zeros(_N, np.int64))
    assert _blend_with(chance, known) == (1.0, pytest.approx(0.02, abs=0.01))
    share, gain = _blend_with(1.0 - known.score, known)  # always wrong
    assert (share, gain) == (0.0, pytest.approx(0.0, abs=1e-12))


def test_a_weak_gain_is_followed_instead_of_being_dropped() -> None:
    rng = np.random.default_rng(5)
    chance = 0.5 + rng.normal(0, 0.06, (_N, _K))
    sample = _sample(chance, np.zeros(1, np.int64), np.zeros(_N, np.int64))
    share, gain = _blend_with(chance + rng.normal(0, 0.06, chance.shape), sample)
    assert share >= 0.25
    assert 0 < gain < 0.01


def test_parts_of_a_category_are_pulled_together_only_if_they_differ_by_luck() -> None:
    labels = np.arange(_N) % 40
    parent = np.zeros(40, np.int64)
    alike = _even(np.array([0.3, 0.5, 0.7]))
    differ = np.random.default_rng(0).uniform(0.1, 0.9, (40, _K))
    for sample, low, high in (
        (_sample(np.tile([0.3, 0.5, 0.7], (_N, 1)), parent, labels), 0.0, 0.03),
        (_sample(differ[labels], parent, labels), 0.15, 0.4),
    ):
        table = _table(sample, sample.score.mean(axis=0), QualitySettings())
        assert low <= table.std(axis=0).max() <= high
    assert _table(alike, alike.score.mean(axis=0), QualitySettings()).shape == (1, _K)


def test_calibration_moves_no_route() -> None:
    sample = _even(np.array([0.2, 0.5, 0.9]))
    quality = np.clip(np.random.default_rng(1).normal(0.5, 0.2, (_N, _K)), 0.01, 0.99)
    calibrated = fit_recalibration(quality, sample.score).apply(quality)
    assert (np.argsort(calibrated, axis=1) == np.argsort(quality, axis=1)).all()
    assert abs(calibrated.mean() - sample.score.mean()) < 0.02
    assert contrasts(calibrated)[1].std() < contrasts(quality)[1].std()  # noise is toned down
