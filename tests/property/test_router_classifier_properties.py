from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from routers.classifier import (
    Gates,
    LinearHead,
    Mixing,
    References,
    RouterModel,
    knn_posterior,
)
from routers.types import GENERAL

seeds = st.integers(0, 2**32 - 1)


def unit(rng: np.random.Generator, rows: int, d: int) -> np.ndarray:
    raw = rng.normal(size=(rows, d))
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


def random_model(rng: np.random.Generator) -> RouterModel:
    d, rows, c = (int(v) for v in rng.integers((2, 3, 2), (9, 40, 6)))
    names = [GENERAL, "a", "b", "c", "d"][-c:] if rng.random() < 0.5 else list("vwxyz")[:c]
    return RouterModel(
        names,
        References(unit(rng, rows, d).astype(np.float16), rng.integers(0, c, rows)),
        LinearHead(
            rng.normal(scale=5, size=(d, c)).astype(np.float32),
            rng.normal(size=c).astype(np.float32),
        ),
        Mixing(int(rng.integers(1, 60)), float(rng.random()), float(rng.uniform(0.1, 5))),
        Gates(float(rng.random()), float(rng.uniform(-1, 1))),
    )


@given(seeds)
def test_decisions_are_sound(seed: int) -> None:
    rng = np.random.default_rng(seed)
    router = random_model(rng)
    queries = unit(rng, 7, router.head.weights.shape[0])
    for answer in router.classify(queries):
        assert abs(sum(answer.posterior.values()) - 1.0) < 1e-9
        assert min(answer.posterior.values()) >= 0.0
        assert set(answer.posterior) == set(router.categories)
        assert 0.0 <= answer.entropy <= 1.0
        assert -1.001 <= answer.similarity <= 1.001
        assert answer.posterior[answer.best_guess] == max(answer.posterior.values())
        assert answer.category == (GENERAL if answer.gate else answer.best_guess)
        closed = (
            answer.entropy > router.gates.entropy_max
            or answer.similarity < router.gates.similarity_min
        )
        assert (answer.gate is not None) == closed


@given(seeds)
def test_one_row_is_decided_as_in_a_batch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    router = random_model(rng)
    queries = unit(rng, 5, router.head.weights.shape[0])
    batch, _ = router.posterior(queries)
    single = np.vstack([router.posterior(queries[i : i + 1])[0] for i in range(5)])
    np.testing.assert_allclose(batch, single, atol=1e-3)


@given(seeds, st.integers(1, 50))
def test_votes_equal_a_plain_reading_of_the_definition(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    cosines = rng.uniform(-1, 1, size=(3, 30))
    labels = rng.integers(0, 4, 30)
    votes, nearest = knn_posterior(cosines, labels, 4, k)
    for row, got, best in zip(cosines, votes, nearest, strict=True):
        expected = np.zeros(4)
        for i in sorted(range(30), key=lambda i: -row[i])[:k]:
            expected[labels[i]] += max(0.0, row[i])
        total = expected.sum()
        expected = expected / total if total > 0 else np.full(4, 0.25)
        np.testing.assert_allclose(got, 0.999 * expected + 0.001 / 4)
        assert best == row.max()


@given(seeds)
def test_renaming_order_of_references_changes_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cosines = rng.uniform(-1, 1, size=(2, 20))  # continuous, so no ties
    labels = rng.integers(0, 3, 20)
    order = rng.permutation(20)
    one, _ = knn_posterior(cosines, labels, 3, 5)
    other, _ = knn_posterior(cosines[:, order], labels[order], 3, 5)
    np.testing.assert_allclose(one, other)
