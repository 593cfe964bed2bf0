"""What cascade routing got on the test rows, beside what it generalises, as figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from gateway.evaluation.curve_metrics import area, cost_to_reach, upper_hull
from gateway.evaluation.intervals import Interval, resampled, resampled_mean
from gateway.evaluation.pair_metrics import pair_curve_figures

__all__ = ["CascadeResult", "Curve"]

FloatArray = NDArray[np.float64]

_OWN: Final = "cascade_routing"


@dataclass(frozen=True, slots=True)
class Curve:
    """Per-query outcomes of one method's settings on the test rows: score and cost (settings, m).

    ``best`` is the setting that scores highest on the training rows. ``ran`` (settings, m, k):
    which experts answered; None where the method does not say.
    """

    score: FloatArray
    cost: FloatArray
    best: int
    ran: NDArray[np.bool_] | None = None

    def points(self, weights: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
        """Mean (cost, score) per setting, by ascending cost; ``weights`` (m,) of a resample."""
        cost = np.average(self.cost, axis=1, weights=weights)
        score = np.average(self.score, axis=1, weights=weights)
        order = np.argsort(cost, kind="stable")
        return cost[order], score[order]


@dataclass(frozen=True, slots=True)
class CascadeResult:
    """Curves of the three methods and of the single experts, with what they are compared on."""

    curves: dict[str, Curve]
    singles: Curve
    best_single: int
    seed: int
    tasks: dict[str, CascadeResult] = field(default_factory=dict)

    def as_json(self, *, resamples: int | None = None) -> dict[str, Any]:
        """``result["cascade"]``. ``resamples`` of each interval; None takes the usual number."""
        summaries = {name: self._summary(curve) for name, curve in self.curves.items()}
        return {
            **summaries.pop(_OWN),
            **self._pair(),
            **summaries,
            "at_half_cost_of_best_single": self._at_half_cost(),
            "ci95": self._area_intervals(resamples),
            **({"tasks": self._by_task(resamples)} if self.tasks else {}),
        }

    def from_best_single(self, resamples: int | None = None) -> dict[str, Interval]:
        """Differences from the best single expert: at the best price, and at half its cost."""
        own, target = self.curves[_OWN], self.singles.score[self.best_single]
        return {
            "cascade_best_score": resampled_mean(own.score[own.best] - target, self.seed),
            "cascade_at_half_cost_of_best_single": self._resampled(
                lambda weights: self._score_at_half_cost(weights) - self._target(weights), resamples
            ),
        }

    def area_over(
        self, rival: Callable[[FloatArray], float], resamples: int | None = None
    ) -> Interval:
        """Area less another method's, which ``rival`` tells for queries weighted (m,)."""
        return self._resampled(
            lambda weights: self._area(_OWN, weights) - rival(weights), resamples
        )

    def _summary(self, curve: Curve) -> dict[str, Any]:
        cost, score = curve.points()
        low, high = self._range()
        hull = upper_hull(cost, score)
        return {
            "curve": [
                {"cost": float(c), "score": float(s)} for c, s in zip(cost, score, strict=True)
            ],
            "auc": area(cost, score, low, high),
            "aiq": area(cost[hull], score[hull], low, high),
            "best_score": float(curve.score[curve.best].mean()),
            "best_score_cost": float(curve.cost[curve.best].mean()),
            "cost_at_best_single_score": cost_to_reach(cost, score, self._target()),
        }

    def _pair(self) -> dict[str, float | None]:
        """Of two experts: figures over the share of queries for which the strong one was called."""
        own = self.curves[_OWN]
        if len(self.singles.score) != 2 or own.ran is None:
            return {}
        return pair_curve_figures(
            own.ran[:, :, self.best_single].mean(axis=1),
            own.score.mean(axis=1),
            weak=float(self.singles.score[1 - self.best_single].mean()),
            strong=self._target(),
        )

    def _target(self, weights: FloatArray | None = None) -> float:
        return float(np.average(self.singles.score[self.best_single], weights=weights))

    def _range(self, weights: FloatArray | None = None) -> tuple[float, float]:
        """Mean costs of the cheapest and of the dearest single expert."""
        means = np.average(self.singles.cost, axis=1, weights=weights)
        return float(means.min()), float(means.max())

    def _area(self, name: str, weights: FloatArray | None = None) -> float:
        return area(*self.curves[name].points(weights), *self._range(weights))

    def _score_at_half_cost(self, weights: FloatArray | None = None) -> float:
        cost = float(np.average(self.singles.cost[self.best_single], weights=weights)) / 2.0
        return float(np.interp(cost, *self.curves[_OWN].points(weights)))

    def _at_half_cost(self) -> dict[str, float]:
        """What cascade routing scores at half of the best single expert's cost."""
        score = self._score_at_half_cost()
        return {
            "cost": float(self.singles.cost[self.best_single].mean()) / 2.0,
            "score": score,
            "score_difference": score - self._target(),
        }

    def _by_task(self, resamples: int | None) -> dict[str, Any]:
        """Per task: areas of all methods, their differences' intervals, and half the best cost."""
        return {
            name: {
                "n": alone.singles.score.shape[1],
                "auc": {key: alone._area(key) for key in alone.curves},
                "at_half_cost_of_best_single": alone._at_half_cost(),
                "ci95": alone._area_intervals(resamples),
            }
            for name, alone in self.tasks.items()
        }

    def _area_intervals(self, resamples: int | None) -> dict[str, Interval]:
        """Area of cascade routing less that of each other method."""

        def over(rival: str) -> Interval:
            return self.area_over(lambda weights: self._area(rival, weights), resamples)

        return {f"auc_minus_{name}": over(name) for name in self.curves if name != _OWN}

    def _resampled(self, figure: Callable[[FloatArray], float], resamples: int | None) -> Interval:
        return resampled(figure, self.singles.score.shape[1], self.seed, resamples)
