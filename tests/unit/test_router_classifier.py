from __future__ import annotations

import numpy as np
import pytest

from routers.classifier import (
    Gates,
    LinearHead,
    Mixing,
    References,
    RouterModel,
    blended,
    knn_posterior,
    normalised_entropy,
)
from routers.fit import best_gates
from routers.metrics import expected_calibration_error, measured
from routers.types import GENERAL, Classification

OPEN = Gates(entropy_max=1.0, similarity_min=-1.0)


def model(categories: tuple[str, ...] = ("json", "sql"), gates: Gates = OPEN) -> RouterModel:
    """Two axes, one per category, and a head that agrees with them."""
    eye = np.eye(2)
    return RouterModel(
        categories,
        References(eye.astype(np.float16), np.array([0, 1])),
        LinearHead((4 * eye).astype(np.float32), np.zeros(2, dtype=np.float32)),
        Mixing(neighbours=1, knn_share=0.5, temperature=1.0),
        gates,
    )


def decide(router: RouterModel, *vector: float) -> Classification:
    unit = np.array([vector], dtype=np.float32) / np.linalg.norm(vector)
    return router.classify(unit.astype(np.float32))[0]


def test_votes_are_weighted_by_cosine() -> None:
    cosines = np.array([[0.9, 0.6, 0.1, -0.5]])
    votes, nearest = knn_posterior(cosines, np.array([0, 1, 1, 1]), 2, neighbours=2)
    assert votes[0] == pytest.approx([0.6, 0.4], abs=1e-3)
    assert nearest[0] == 0.9


def test_query_without_a_positive_cosine_gets_the_uniform_vote() -> None:
    votes, _ = knn_posterior(np.array([[-0.1, -0.2]]), np.array([0, 1]), 2, neighbours=2)
    assert votes[0] == pytest.approx([0.5, 0.5])


def test_more_neighbours_than_references_all_vote() -> None:
    votes, _ = knn_posterior(np.array([[0.5, 0.5]]), np.array([0, 1]), 2, neighbours=50)
    assert votes[0] == pytest.approx([0.5, 0.5])


def test_high_temperature_flattens_low_temperature_sharpens() -> None:
    posterior = np.array([[0.8, 0.2]])
    hot = blended(posterior, posterior, Mixing(1, 0.5, 10.0))
    cold = blended(posterior, posterior, Mixing(1, 0.5, 0.1))
    assert hot[0, 0] < 0.6
    assert cold[0, 0] > 0.99


def test_entropy_runs_from_certain_to_ignorant() -> None:
    entropy = normalised_entropy(np.array([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3]]))
    assert entropy == pytest.approx([0.0, 1.0])


def test_clear_query_passes_both_gates() -> None:
    answer = decide(model(gates=Gates(0.5, 0.9)), 1.0, 0.0)
    assert (answer.category, answer.best_guess, answer.gate) == ("json", "json", None)


def test_torn_query_is_general_by_the_entropy_gate() -> None:
    answer = decide(model(gates=Gates(0.5, 0.0)), 1.0, 0.99)
    assert (answer.category, answer.best_guess, answer.gate) == (GENERAL, "json", "entropy")


def test_unfamiliar_query_is_general_by_the_similarity_gate() -> None:
    answer = decide(model(gates=Gates(1.0, 0.9)), 1.0, 0.9)
    assert (answer.category, answer.gate) == (GENERAL, "similarity")


def test_general_is_a_category_even_when_nothing_was_labelled_so() -> None:
    router = model()
    assert router.categories == ("json", "sql", GENERAL)
    assert decide(router, 1.0, 0.0).posterior[GENERAL] == 0.0


def test_calibration_error_is_the_gap_weighted_by_bin() -> None:
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    correct = np.array([True, True, True, False, True, False])
    expected = 4 / 6 * abs(0.95 - 0.75) + 2 / 6 * abs(0.55 - 0.5)
    assert expected_calibration_error(confidence, correct) == pytest.approx(expected)


def test_metrics_tell_decisions_from_guesses() -> None:
    decisions = [
        Classification("sql", "sql", {"sql": 0.9, "json": 0.1}, 0.4, 0.9, None),
        Classification(GENERAL, "sql", {"sql": 0.6, "json": 0.4}, 0.9, 0.9, "entropy"),
        Classification("sql", "sql", {"sql": 0.8, "json": 0.2}, 0.5, 0.9, None),
    ]
    metrics = measured(decisions, ["sql", "sql", "json"])
    assert metrics.accuracy == pytest.approx(1 / 3)
    assert metrics.best_guess_accuracy == pytest.approx(2 / 3)
    assert metrics.score == pytest.approx((1 + 0.5 + 0) / 3)
    assert metrics.gate_rates == {
        "entropy": pytest.approx(1 / 3),
        "similarity": 0.0,
        "ablation": 0.0,
        "novelty": 0.0,
    }
    assert metrics.recall == {"json": 0.0, "sql": 0.5}


def test_entropy_gate_closes_between_right_and_wrong_guesses() -> None:
    # 20 sure and right, 20 unsure and wrong (their label is general).
    posterior = np.array([[0.01, 0.99]] * 20 + [[0.4, 0.6]] * 20)
    labels = np.array([1] * 20 + [0] * 20)
    gates = best_gates(posterior, np.full(40, 0.7), labels, (GENERAL, "sql"))
    sure, unsure = normalised_entropy(posterior)[[0, 39]]
    assert sure < gates.entropy_max < unsure


def test_similarity_gate_turns_away_confident_strangers() -> None:
    posterior = np.array([[0.01, 0.99]] * 40)
    nearest = np.concatenate([np.full(20, 0.8), np.full(20, 0.2)])
    labels = np.array([1] * 20 + [0] * 20)
    gates = best_gates(posterior, nearest, labels, (GENERAL, "sql"))
    assert 0.2 < gates.similarity_min <= 0.8


def test_without_general_prompts_the_least_familiar_rows_are_turned_away() -> None:
    posterior = np.array([[0.01, 0.99], [0.99, 0.01]] * 50)
    nearest = np.linspace(0.4, 0.9, 100)
    gates = best_gates(posterior, nearest, np.array([1, 0] * 50), ("json", "sql"))
    assert (nearest < gates.similarity_min).sum() == 5
