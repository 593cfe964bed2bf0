"""The parts of the quality estimates, each against an independent computation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesRegressor, HistGradientBoostingRegressor
from sklearn.linear_model import Ridge

import routers.ridge
from routers.features import SIGN_COUNT, SIGN_NAMES, fit_vocabulary, hashed, signs
from routers.forest import _as_low, fit_forest
from routers.ridge import DenseScale, design, fit_dense_scale, ridge
from routers.trees import fit_trees

_TEXTS = [
    "What is 12 + 30? A) 40 B) 42 C) 44",
    "Name the capital of France.",
    "def f(x): return x[::-1] assert f('ab') == ??",
    "Which of these is NOT a mammal? A. whale B. shark C. bat D. mouse",
    "什么是光合作用？",
]


def test_signs_have_names_and_are_finite_for_any_text() -> None:
    assert SIGN_COUNT == len(SIGN_NAMES) == len(set(SIGN_NAMES))
    for text in [*_TEXTS, "", "9" * 5000, "((((", "A) ", "\U0001f600" * 50, "1,2.3.4,5" * 9]:
        found = signs(text)
        assert found.shape == (SIGN_COUNT,)
        assert np.isfinite(found).all()
    assert signs(_TEXTS[3])[SIGN_NAMES.index("choices")] == 4
    assert signs(_TEXTS[1])[SIGN_NAMES.index("choices")] == 0


def test_word_pairs_are_counted_and_scripts_without_spaces_are_split() -> None:
    twice = hashed("red fish red fish")
    assert sorted(twice.counts.tolist()) == [1.0, 2.0, 2.0, 2.0]  # fish-red; red, fish, red-fish
    assert len(hashed("什么是光").ids) == 7  # four signs, three pairs


def test_weights_have_unit_length_and_unknown_words_none() -> None:
    vocabulary = fit_vocabulary([hashed(text) for text in _TEXTS * 2])
    _, weights = vocabulary.weigh(hashed(_TEXTS[0]))
    assert np.linalg.norm(weights) == pytest.approx(1.0)
    columns, _ = vocabulary.weigh(hashed("zyzzyva quux"))
    assert len(columns) == 0


def test_ridge_agrees_with_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers.ridge, "_TOLERANCE", 1e-4)
    rng = np.random.default_rng(0)
    texts = [hashed(" ".join(rng.choice(list("abcdefgh"), 6))) for _ in range(80)]
    vocabulary = fit_vocabulary(texts)
    dense = rng.normal(size=(80, 5)).astype(np.float32)
    rows, y = design(vocabulary, texts, dense), rng.normal(size=(80, 2))
    weights, bias = ridge(rows, y, np.array([2.0, 30.0]))
    x = np.hstack([rows.text.toarray(), dense])
    for t, penalty in enumerate((2.0, 30.0)):
        wanted = Ridge(penalty).fit(x, y[:, t]).predict(x)
        assert rows.times(weights)[:, t] + bias[t] == pytest.approx(wanted, abs=0.01)


def test_trees_in_numpy_predict_what_scikit_learn_predicts() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 4)).astype(np.float32)
    target = (rows[:, :1] > 0) * 1.0 + rows[:, 1:2] * 0.1
    trees = fit_trees(rows, np.hstack([target, -target]), seed=3)
    reference = HistGradientBoostingRegressor(
        max_iter=150,
        learning_rate=0.04,
        max_leaf_nodes=8,
        min_samples_leaf=15,
        l2_regularization=10.0,
        max_features=0.3,
        early_stopping=False,
        random_state=3,
    ).fit(rows, target[:, 0])
    unseen = rng.normal(size=(50, 4)).astype(np.float32)
    assert trees.predict(unseen)[:, 0] == pytest.approx(reference.predict(unseen), abs=1e-4)


def test_a_forest_in_numpy_predicts_what_scikit_learn_predicts() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(300, 4)).astype(np.float32)
    target = (rows[:, :1] > 0) * 1.0 + rows[:, 1:2] * 0.1
    targets = np.hstack([target, -target, target**2])
    forest = fit_forest(rows, targets, seed=3)
    reference = ExtraTreesRegressor(
        n_estimators=150, min_samples_leaf=8, max_features=0.3, random_state=3
    ).fit(rows, targets)
    unseen = rng.normal(size=(2_050, 4)).astype(np.float32)
    assert forest.predict(unseen) == pytest.approx(reference.predict(unseen), abs=1e-3)
    assert forest.predict(unseen[:1]) == pytest.approx(forest.predict(unseen)[:1])


def test_a_feature_on_a_threshold_goes_the_same_way_in_both_precisions() -> None:
    """The threshold lies between two float32 numbers; rounded up, the feature above would pass."""
    above = np.nextafter(np.float32(0.1), np.float32(1.0))
    threshold = np.array([0.75 * float(above) + 0.25 * 0.1])
    assert np.float32(threshold[0]) == above
    assert _as_low(threshold)[0] == np.float32(0.1)


def test_the_leaves_of_a_forest_are_bounded_whatever_the_rows() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(20_000, 3)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("routers.forest._TREES", 2)
        patch.setattr("routers.forest._LEAVES_MAX", 100)
        found = fit_forest(rows, rng.normal(size=(20_000, 2)), seed=0)
    assert len(found.value) <= 2 * 100


@pytest.mark.parametrize(
    ("name", "value"), [("left", 0), ("right", 10_000), ("root", -1), ("leaf", 10_000)]
)
def test_a_forest_whose_nodes_lead_nowhere_or_back_is_refused(name: str, value: int) -> None:
    """A walk over them would have no end, in the gateway's only thread for routing."""
    rows = np.random.default_rng(2).normal(size=(100, 3))
    sound = fit_forest(rows, rows[:, :2], seed=0)
    inner = int(np.flatnonzero(sound.feature >= 0)[0])
    leaf = int(np.flatnonzero(sound.feature < 0)[0])
    field, at = {"root": ("root", 0), "leaf": ("left", leaf)}.get(name, (name, inner))
    forged = getattr(sound, field).copy()
    forged[at] = value
    with pytest.raises(ValueError, match="leads nowhere or back"):
        replace(sound, **{field: forged})


@pytest.mark.parametrize("value", [0, 500])
def test_trees_whose_nodes_lead_nowhere_or_back_are_refused(value: int) -> None:
    rows = np.random.default_rng(2).normal(size=(100, 3)).astype(np.float32)
    sound = fit_trees(rows, rows[:, :2].astype(np.float64), seed=0)
    forged = sound.right.copy()
    forged[0, 0, 0] = value
    with pytest.raises(ValueError, match="leads nowhere or back"):
        replace(sound, right=forged)


def test_trees_whose_arrays_differ_in_length_are_refused() -> None:
    """By the error that the loader turns into one with the file and the remedy."""
    rows = np.random.default_rng(2).normal(size=(100, 3)).astype(np.float32)
    forest = fit_forest(rows, rows[:, :2].astype(np.float64), seed=0)
    trees = fit_trees(rows, rows[:, :2].astype(np.float64), seed=0)
    for short in (forest.left[:-1], forest.left[:0]):
        with pytest.raises(ValueError, match="differ in length"):
            replace(forest, left=short)
    for short in (trees.left[:, :, :-1], trees.left[:, 0]):
        with pytest.raises(ValueError, match="differ in length"):
            replace(trees, left=short)


def test_a_sign_far_outside_training_counts_as_its_limit() -> None:
    scale = fit_dense_scale(np.random.default_rng(0).normal(size=(50, 3)))
    wild = scale.scaled(np.array([[1e9, 0.0, -1e9]]))
    assert wild[0, 0] == pytest.approx(0.4)
    assert wild[0, 2] == pytest.approx(-0.4)
    constant = DenseScale(np.zeros(1), np.array([np.inf]))
    assert constant.scaled(np.array([[5.0]]))[0, 0] == 0.0
