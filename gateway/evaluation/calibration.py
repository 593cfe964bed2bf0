"""How far estimates can be taken at their word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["calibration", "reliability"]

FloatArray = NDArray[np.float64]
_BINS = 10


def calibration(
    experts: Sequence[str], quality: FloatArray, score: FloatArray
) -> dict[str, dict[str, float]]:
    """ECE (10 equal-width bins) and Brier score per expert, of estimates [n, k]."""
    return {
        name: {
            "ece": sum(
                b["share"] * abs(b["estimated"] - b["scored"])
                for b in reliability(quality[:, k], score[:, k])
            ),
            "brier": float(((quality[:, k] - score[:, k]) ** 2).mean()),
        }
        for k, name in enumerate(experts)
    }


def reliability(quality: FloatArray, score: FloatArray) -> list[dict[str, Any]]:
    """Mean estimate and mean score in each bin that holds queries, and the share it holds."""
    index = np.minimum((quality * _BINS).astype(int), _BINS - 1)
    return [
        {
            "estimated": float(quality[index == b].mean()),
            "scored": float(score[index == b].mean()),
            "share": float((index == b).mean()),
        }
        for b in np.unique(index)
    ]
