"""Types of the router layer: what a classification says, and what a router offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

GATES = ("entropy", "similarity", "ablation", "novelty")
GENERAL = "general"  # the category of whatever is uncertain or unfamiliar


@dataclass(frozen=True, slots=True)
class Classification:
    """Step one of the Composition-of-Experts router for one query.

    ``category`` is the decision; ``best_guess`` what it would be without the gates. ``posterior``
    is calibrated and sums to 1. ``entropy`` is normalised by ln(C) to 0..1. ``similarity`` is the
    cosine to the nearest training prompt. ``gate`` names what sent the query to ``general``:
    "entropy", "similarity", "ablation", "novelty", or None.
    """

    category: str
    best_guess: str
    posterior: Mapping[str, float]
    entropy: float
    similarity: float
    gate: str | None
    cached: bool = False
    quality: Mapping[str, float] | None = None


class QueryRouter(Protocol):
    """Turns the user's own words into a category. Safe to call from many tasks at once."""

    @property
    def categories(self) -> tuple[str, ...]: ...

    @property
    def artifact_digest(self) -> str: ...

    async def classify(self, text: str) -> Classification:
        """Classify one query. Never blocks the event loop; batches with concurrent callers."""
        ...

    async def aclose(self) -> None: ...
