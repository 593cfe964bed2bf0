"""Out of scope or not: how likely a query is ``general``, from what step one knows already.

A posterior says which of the trained categories a query resembles most, not whether it resembles
any: shares add up to 1 however far away the query is. A logistic regression on the share of
``general``, the largest other share and the cosine to the nearest training prompt knows both, and
is fitted on out-of-fold rows (``routers.novelty_fit``). Out-of-scope queries as a category that
needs a signal of its own follow Larson et al., "An Evaluation Dataset for Intent Classification and
Out-of-Scope Prediction", 2019; slopes that may not change sign are our own. Only numpy is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from routers.types import GENERAL

__all__ = ["Novelty", "rescaled", "signals_of"]

Float64Array = NDArray[np.float64]

_SHARE_FLOOR: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Novelty:
    """P(general) = σ(``general``·logit p_general - ``other``·logit p_other - ``nearness``·cosine +
    ``bias``), p_other being the largest share of another category. Above ``share_max`` a query is
    ``general``. The three slopes are not negative: no query becomes more familiar by distance.
    """

    general: float
    other: float
    nearness: float
    bias: float
    share_max: float

    def share(
        self, posterior: Float64Array, nearest: Float64Array, categories: Sequence[str]
    ) -> Float64Array:
        """[n] probability of ``general``, from posteriors [n, c] and the largest cosines [n]."""
        signals = signals_of(posterior, nearest, categories)
        logit = signals @ np.array([self.general, self.other, self.nearness]) + self.bias
        result: Float64Array = 1 / (1 + np.exp(-logit))
        return result


def rescaled(
    posterior: Float64Array, share: Float64Array, categories: Sequence[str]
) -> Float64Array:
    """Posteriors [n, c] with ``share`` [n] for ``general``, the others in their proportions."""
    general = categories.index(GENERAL)
    rest = np.delete(posterior, general, axis=1)
    scale = (1 - share) / np.maximum(rest.sum(axis=1), _SHARE_FLOOR)
    return np.insert(rest * scale[:, None], general, share, axis=1)


def signals_of(
    posterior: Float64Array, nearest: Float64Array, categories: Sequence[str]
) -> Float64Array:
    """[n, 3], each rising with how strange a query is."""
    general = categories.index(GENERAL)
    other = np.delete(posterior, general, axis=1).max(axis=1)
    return np.stack([_logit(posterior[:, general]), -_logit(other), -nearest], axis=1)


def _logit(share: Float64Array) -> Float64Array:
    inside = np.clip(share, _SHARE_FLOOR, 1 - _SHARE_FLOOR)
    result: Float64Array = np.log(inside / (1 - inside))
    return result
