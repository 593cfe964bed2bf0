from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experts.errors import ConfigError
from routers.fit import FitSettings, Sample, cross_validated, fit
from routers.train import train
from routers.types import GENERAL


def clusters(rows: int = 150, spread: float = 0.35, seed: int = 0) -> Sample:
    """Three clouds on the sphere, one per category, with neighbours kept apart by group."""
    rng = np.random.default_rng(seed)
    centres = np.eye(8)[:3]
    labels = np.arange(rows) % 3
    raw = centres[labels] + rng.normal(scale=spread, size=(rows, 8))
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    return Sample(unit.astype(np.float16), labels, np.arange(rows), (GENERAL, "json", "sql"))


def test_fit_is_deterministic_for_a_seed() -> None:
    one, other = (fit(clusters(), seed=3) for _ in range(2))
    assert (one.mixing, one.gates) == (other.mixing, other.gates)
    np.testing.assert_array_equal(one.head.weights, other.head.weights)


def test_cross_validation_finds_what_is_there_and_nothing_in_noise() -> None:
    sample = clusters()
    found = cross_validated(sample, seed=0)
    right = [
        d.best_guess == sample.categories[c] for d, c in zip(found, sample.labels, strict=True)
    ]
    assert np.mean(right) > 0.8

    shuffled = np.random.default_rng(1).permutation(sample.labels)
    noise = Sample(sample.vectors, shuffled, sample.groups, sample.categories)
    guesses = cross_validated(noise, seed=0)
    lucky = [d.best_guess == sample.categories[c] for d, c in zip(guesses, shuffled, strict=True)]
    assert np.mean(lucky) < 0.5


def test_groups_are_never_split() -> None:
    """Copies in one group would vote for each other across folds and hide that labels are noise."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=(60, 8))
    unit = base / np.linalg.norm(base, axis=1, keepdims=True)
    vectors = np.repeat(unit, 5, axis=0).astype(np.float16)
    labels = np.repeat(rng.permutation(np.arange(60) % 3), 5)
    names = (GENERAL, "json", "sql")

    def accuracy(groups: np.ndarray) -> float:
        answers = cross_validated(Sample(vectors, labels, groups, names), seed=0)
        return float(
            np.mean([a.best_guess == names[c] for a, c in zip(answers, labels, strict=True)])
        )

    assert accuracy(np.arange(300)) > 0.8
    assert accuracy(np.repeat(np.arange(60), 5)) < 0.5


def test_two_categories_keep_the_direction_of_the_head() -> None:
    sample = clusters()
    two = sample.rows(np.flatnonzero(sample.labels != 2))
    model = fit(Sample(two.vectors, two.labels, two.groups, (GENERAL, "json")), seed=0)
    sure = model.classify(np.eye(8, dtype=np.float32)[:2])
    assert [a.best_guess for a in sure] == [GENERAL, "json"]


def test_references_are_bounded() -> None:
    model = fit(clusters(), seed=0, settings=FitSettings(references_max=40))
    assert model.references.vectors.shape == (40, 8)


def test_category_of_one_template_is_refused_before_any_work(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {i}", "category": GENERAL} for i in range(20)]
    rows += [{"prompt": f"select {i}", "category": "sql", "group": "t1"} for i in range(20)]
    data = tmp_path / "p.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ConfigError, match="'sql' has 1 groups"):
        train(data, tmp_path / "out", seed=0, created="", progress=lambda *_: None)
    assert not (tmp_path / "out").exists()
