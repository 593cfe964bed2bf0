"""One interval for a figure that was measured on several splits of the same queries."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

__all__ = ["pooled_interval"]

Figure = Callable[[NDArray[np.int64]], float]

_RESAMPLES: Final = 500


def pooled_interval(
    figures: Sequence[Figure], keys: Sequence[NDArray[np.uint64]], seed: int = 0
) -> dict[str, Any]:
    """Mean of ``figures`` over splits, and its bootstrap interval over prompts.

    ``keys[i]`` [n_i] name the prompts that split i scores; ``figures[i]`` takes rows of split i,
    a row as often as its prompt was drawn. A prompt that several splits score is drawn for all of
    them at once, so that splits do not count as independent. What the interval does not contain is
    the choice of training rows; ``by_split`` shows that.
    """
    prompts, where = np.unique(np.concatenate(keys), return_inverse=True)
    ends = np.cumsum([len(part) for part in keys])
    places = np.split(where, ends[:-1])
    rng = np.random.default_rng(seed)

    def drawn() -> float:
        counts = np.bincount(rng.integers(0, len(prompts), len(prompts)), minlength=len(prompts))
        rows = [np.repeat(np.arange(len(place)), counts[place]) for place in places]
        return float(np.mean([f(r) for f, r in zip(figures, rows, strict=True)]))

    by_split = [figure(np.arange(len(part))) for figure, part in zip(figures, keys, strict=True)]
    low, high = np.quantile([drawn() for _ in range(_RESAMPLES)], [0.025, 0.975])
    return {
        "difference": float(np.mean(by_split)),
        "low": float(low),
        "high": float(high),
        "by_split": by_split,
        "prompts": len(prompts),
    }
