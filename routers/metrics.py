"""How good a classifier's decisions are, computed from held-out predictions only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from routers.types import GATES, GENERAL, Classification

__all__ = ["Metrics", "decision_score", "expected_calibration_error", "measured"]

GENERALIST_SCORE: Final = 0.5
"""What a specialist's query is worth at the generalist, when the right expert gets 1, a wrong 0."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Shares in 0..1 over held-out queries.

    ``accuracy``: the decision, gates included, is the label. ``best_guess_accuracy``: the same
    without gates. ``score``: mean of 1 for the right category, ``GENERALIST_SCORE`` for a
    specialist's query sent to ``general``, 0 for a wrong specialist. ``ece``: expected calibration
    error of the best guess, 10 equal-width bins. ``gate_rates``: share of queries each gate sent
    to ``general``. ``recall``: accuracy within each category.
    """

    accuracy: float
    best_guess_accuracy: float
    score: float
    ece: float
    log_loss: float
    gate_rates: dict[str, float]
    recall: dict[str, float]


def measured(decisions: Sequence[Classification], labels: Sequence[str]) -> Metrics:
    """Compare decisions with the labels of the same queries."""
    truth = np.array(labels)
    chosen = np.array([d.category for d in decisions])
    guessed = np.array([d.best_guess for d in decisions])
    confidence = np.array([max(d.posterior.values()) for d in decisions])
    given = np.array([d.posterior.get(c, 0.0) for d, c in zip(decisions, labels, strict=True)])
    right = chosen == truth
    gates = [d.gate for d in decisions]
    return Metrics(
        accuracy=float(right.mean()),
        best_guess_accuracy=float((guessed == truth).mean()),
        score=float(np.mean(list(map(decision_score, labels, chosen)))),
        ece=expected_calibration_error(confidence, guessed == truth),
        log_loss=float(-np.log(np.maximum(given, 1e-12)).mean()),
        gate_rates={g: gates.count(g) / len(gates) for g in GATES},
        recall={c: float(right[truth == c].mean()) for c in sorted(set(labels))},
    )


def decision_score(label: str, decision: str) -> float:
    """Stand-in for answer quality where only labels are known."""
    if label == decision:
        return 1.0
    return GENERALIST_SCORE if decision == GENERAL else 0.0


def expected_calibration_error(
    confidence: NDArray[np.float64], correct: NDArray[np.bool_], bins: int = 10
) -> float:
    """Σ_b (n_b / n)·|mean confidence − accuracy| over equal-width bins (Guo et al. 2017, §2)."""
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.zeros(bins)
    for b in np.unique(index):
        inside = index == b
        gaps[b] = abs(confidence[inside].mean() - correct[inside].mean()) * inside.mean()
    return float(gaps.sum())
