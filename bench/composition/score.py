"""Scores of a run: accuracy, confusion, gain, and how sure one can be. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.composition.ask import Reply
from bench.composition.questions import CATEGORIES, GENERAL, SPECIALISTS

RESAMPLES = 10_000


def accuracy(replies: Sequence[Reply]) -> float:
    """Share of right answers to the questions that can be checked."""
    checked = [r.right for r in replies if r.question.checkable]
    return sum(checked) / len(checked)


def per_task(replies: Sequence[Reply]) -> dict[str, float]:
    """Accuracy by the category that a question belongs to."""
    return {
        task: accuracy(of_task)
        for task in CATEGORIES
        if (of_task := [r for r in replies if r.question.task == task and r.question.checkable])
    }


def confusion(replies: Sequence[Reply]) -> dict[str, dict[str, int]]:
    """Category of the question -> category that the router decided on -> count."""
    counts = Counter((r.question.task, r.category) for r in replies)
    return {task: {c: counts[task, c] for c in CATEGORIES} for task in CATEGORIES}


def routing_accuracy(replies: Sequence[Reply]) -> float:
    return sum(r.category == r.question.task for r in replies) / len(replies)


def swaps(replies: Sequence[Reply]) -> int:
    """Swaps that the answers waited for; answers that waited for one swap name its time."""
    return len({(r.expert, r.swap_ms) for r in replies if r.swap_ms > 0})


def paired_difference(
    ours: Sequence[Reply], theirs: Sequence[Reply], rng: np.random.Generator
) -> tuple[float, float]:
    """95 % interval of the difference in accuracy on the same questions: percentile bootstrap.

    Questions are resampled, each with both its answers (Efron and Tibshirani 1993, chapter 13).
    Raises ``ValueError`` when the two do not answer the same questions in the same order.
    """
    if [r.question.id for r in ours] != [r.question.id for r in theirs]:
        raise ValueError("the two runs answer different questions")
    gains = np.array([a.right - b.right for a, b in zip(ours, theirs, strict=True)], dtype=float)
    drawn = rng.integers(0, len(gains), size=(RESAMPLES, len(gains)))
    low, high = np.percentile(gains[drawn].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def specialist_gain(replies: dict[str, Sequence[Reply]]) -> dict[str, float]:
    """Per task, the specialist's accuracy less the generalist's, in percentage points."""
    scores = {expert: per_task(answers) for expert, answers in replies.items()}
    return {
        task: round(100 * (scores[task][task] - scores[GENERAL][task]), 1)
        for task in SPECIALISTS
        if task in scores
    }


def summary(
    mixed: dict[str, Sequence[Reply]],
    by_hand: dict[str, Sequence[Reply]],
    auto: str,
    seed: int,
) -> dict[str, Any]:
    """Everything that is reported; ``mixed`` and ``by_hand`` map a model to its replies.

    ``mixed`` must hold every expert and ``auto``; ``by_hand`` the generalist, ``auto`` and, for
    each task, at least its specialist's replies to that task.
    """
    singles = {model: accuracy(r) for model, r in mixed.items() if model != auto}
    best = max(singles, key=lambda model: (singles[model], model))
    composed = mixed[auto]
    best_of_task = {
        task: max(per_task(r)[task] for model, r in mixed.items() if model != auto)
        for task in CATEGORIES
    }
    questions = Counter(r.question.task for r in composed)
    ceiling = sum(best_of_task[t] * n for t, n in questions.items()) / len(composed)
    rng = np.random.default_rng(seed)
    low, high = paired_difference(composed, mixed[best], rng)
    return {
        "composition": round(accuracy(composed), 4),
        "best_single": round(singles[best], 4),
        "best_single_expert": best,
        "gain_points": round(100 * (accuracy(composed) - singles[best]), 1),
        "ci95": [round(low, 4), round(high, 4)],
        "per_task_best": round(ceiling, 4),
        "share_of_per_task_best": round(accuracy(composed) / ceiling, 4),
        "per_task": {m: _rounded(per_task(r)) for m, r in mixed.items()},
        "overall": _rounded({m: accuracy(r) for m, r in mixed.items()}),
        "paraphrases_per_task": {m: _rounded(per_task(r)) for m, r in by_hand.items()},
        "composition_paraphrases": round(accuracy(by_hand[auto]), 4),
        "routing_accuracy": round(routing_accuracy(composed), 4),
        "routing_accuracy_paraphrases": round(routing_accuracy(by_hand[auto]), 4),
        "confusion": confusion(composed),
        "confusion_paraphrases": confusion(by_hand[auto]),
        "specialist_gain": specialist_gain(mixed),
        "specialist_gain_paraphrases": specialist_gain(by_hand),
        "questions": dict(questions),
        "questions_paraphrases": dict(Counter(r.question.task for r in by_hand[auto])),
        "swaps": swaps(composed),
        "cost_micro_usd": {m: sum(r.cost_micro_usd for r in rs) for m, rs in mixed.items()},
    }


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in values.items()}
