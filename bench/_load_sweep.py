"""What a sweep of loads says, without an engine: arrivals, figures of a round, reading of many.

Pure; ``swap_load`` plays the rounds.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

BURSTINESS = 3.0  # coefficient of variation of the gaps between one expert's requests
ATTAINMENT = 0.9  # share of requests within the objective that a scheduler has to reach
PATIENCE_OBJECTIVES = 5


@dataclass(frozen=True, slots=True)
class Terms:
    """What callers want: the first token within the objective; they leave when patience ends.
    ``age_bound_ms``: our scheduler's."""

    objective_ms: float
    age_bound_ms: float = 3_000.0

    @property
    def patience_ms(self) -> float:
        return PATIENCE_OBJECTIVES * self.objective_ms


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    expert: str
    prompt: str


@dataclass(slots=True)
class Outcome:
    """Milliseconds from arrival to the first token, of served requests; refusals by class."""

    waits_ms: list[float] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    swaps: int = 0

    def add(self, other: Outcome) -> None:
        self.waits_ms += other.waits_ms
        self.swaps += other.swaps
        for name, count in other.refused.items():
            self.refused[name] = self.refused.get(name, 0) + count

    def summary(self, terms: Terms) -> dict[str, Any]:
        missed = sum(self.refused.values())
        waits = sorted(self.waits_ms + [terms.patience_ms] * missed)
        within = sum(wait <= terms.objective_ms for wait in self.waits_ms)
        return {
            "requests": len(waits),
            "within_objective": within,
            "goodput": round(within / len(waits), 4),
            "refused": self.refused,
            "swaps": self.swaps,
            "wait_ms": {
                name: round(waits[min(len(waits) - 1, int(share * len(waits)))], 1)
                for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
            },
        }


def arrivals(experts: Sequence[str], rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Each expert's Zipf share of exactly ``rate * seconds`` requests, in bursts of its own.

    A gamma renewal process given its count, wound round the window from a random start. Bursts this
    large would otherwise move the number of requests in a window of some seconds by a fifth, and
    the load would not be what it is said to be.
    """
    rng = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(len(experts))]
    shape = 1 / BURSTINESS**2
    found: list[Arrival] = []
    for expert, weight in zip(experts, weights, strict=True):
        count = round(rate * seconds * weight / sum(weights))
        gaps = [rng.gammavariate(shape, 1.0) for _ in range(count)]
        at_s = rng.random() * seconds
        for gap in gaps:
            question = f"{rng.randrange(10**9)} plus {rng.randrange(10**9)} is"
            found.append(Arrival(at_s % seconds, expert, question))
            at_s += gap / math.fsum(gaps) * seconds
    return sorted(found, key=lambda arrival: arrival.at_s)


def ratios(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Ours over theirs, of two summaries at one load."""
    return {
        "goodput_ratio": round(mine["within_objective"] / max(1, theirs["within_objective"]), 2),
        "p99_wait_ratio": round(mine["wait_ms"]["p99"] / theirs["wait_ms"]["p99"], 3),
    }


def main_load(points: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """The highest load up to which ``name`` attains at every load; the lowest when it never does.

    ``points``: by rising ``requests_per_s``, each with the schedulers' summaries by name.
    """
    chosen = points[0]
    for point in points:
        if point[name]["goodput"] < ATTAINMENT:
            break
        chosen = point
    return chosen


def sustained_rate(points: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """The highest request rate at which ``ATTAINMENT`` of the requests meet the objective, which is
    what DistServe (OSDI 2024, section 2.1) calls goodput: where the line between the last load that
    attains it and the first that does not crosses it.

    ``is``: "interpolated", or "at_least" or "at_most" where the sweep does not reach the crossing.
    """
    before: dict[str, Any] | None = None
    for point in points:
        share = point[name]["goodput"]
        if share < ATTAINMENT:
            if before is None:
                return {"requests_per_s": point["requests_per_s"], "is": "at_most"}
            attained = before[name]["goodput"]
            part = (attained - ATTAINMENT) / (attained - share)
            low, high = before["requests_per_s"], point["requests_per_s"]
            return {"requests_per_s": round(low + part * (high - low), 2), "is": "interpolated"}
        before = point
    return {"requests_per_s": points[-1]["requests_per_s"], "is": "at_least"}


def sustained_ratio(mine: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Ours over theirs, of two ``sustained_rate``; where one of them is a bound, so is this."""
    turned = {"at_least": "at_most", "at_most": "at_least", "interpolated": "interpolated"}
    kinds = {mine["is"], turned[theirs["is"]]} - {"interpolated"}
    return {
        "ratio": round(mine["requests_per_s"] / theirs["requests_per_s"], 2),
        "is": "unknown" if len(kinds) > 1 else next(iter(kinds), "interpolated"),
    }
