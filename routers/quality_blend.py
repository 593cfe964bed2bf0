"""How far an estimate leaves the category table, and its calibration, both on out-of-fold rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

from routers.quality import COMPONENTS, Recalibration, contrasts
from routers.quality_sample import OutcomeSample, QualitySettings, folds_of

__all__ = ["Blend", "blended", "fit_recalibration", "opinions_gain"]

Float64Array = NDArray[np.float64]

_STACKING_SEED: Final = 7
_CALIBRATION_ROWS: Final = 10.0
_SLOPE_MIN: Final = 0.05


def opinions_gain(
    held: dict[str, Float64Array],
    sample: OutcomeSample,
    mean: Float64Array,
    settings: QualitySettings,
) -> dict[str, tuple[float, float]]:
    """By how much each opinion, added to the table, lowers the error; with its standard error."""
    base = _row_errors(_stacked({"table": held["table"]}, sample, mean, settings)[1], sample)

    def gained(name: str) -> tuple[float, float]:
        both = {n: held[n] for n in ("table", name)}
        crossed = _stacked(both, sample, mean, settings)[1]
        return _mean_and_error(base - _row_errors(crossed, sample))

    return {name: gained(name) for name in COMPONENTS if name != "table"}


def _row_errors(quality: Float64Array, sample: OutcomeSample) -> Float64Array:
    """[n] squared errors of the differences between experts, which alone decide the route."""
    missed = contrasts(quality)[1] - contrasts(sample.score)[1]
    errors: Float64Array = (missed**2).mean(axis=1)
    return errors


@dataclass(frozen=True, slots=True)
class Blend:
    """``mixing`` [2, components] and out-of-fold sums ``quality`` [n, k]; ``share`` of the way from
    the table to all opinions, and the ``gain`` in squared error there."""

    mixing: Float64Array
    quality: Float64Array
    share: float
    gain: tuple[float, float]


def blended(
    held: dict[str, Float64Array],
    sample: OutcomeSample,
    mean: Float64Array,
    settings: QualitySettings,
) -> Blend:
    """table + share·(all opinions - table), the share with the least out-of-fold error."""
    table, base = _stacked({"table": held["table"]}, sample, mean, settings)
    every, crossed = _stacked(held, sample, mean, settings)

    def at(share: float) -> Float64Array:
        return base + share * (crossed - base)

    share = min(settings.blend, key=lambda share: float(_row_errors(at(share), sample).mean()))
    gain = _mean_and_error(_row_errors(base, sample) - _row_errors(at(share), sample))
    return Blend(table + share * (every - table), at(share), share, gain)


def _mean_and_error(values: Float64Array) -> tuple[float, float]:
    return float(values.mean()), float(values.std() / np.sqrt(len(values)))


def _stacked(
    held: dict[str, Float64Array],
    sample: OutcomeSample,
    mean: Float64Array,
    settings: QualitySettings,
) -> tuple[Float64Array, Float64Array]:
    """Weights [2, components], and sums [n, k] whose weights did not see the row."""
    names = list(held)
    at = [COMPONENTS.index(name) for name in names]
    parts = [contrasts(held[name] - mean) for name in names]
    truth = contrasts(sample.score - mean)
    mixing = np.zeros((2, len(COMPONENTS)))
    total = np.zeros_like(sample.score)
    for i in range(2):
        features = np.stack([part[i] for part in parts], axis=2)  # [n, 1 or k, names]
        mixing[i, at] = _weights(features, truth[i], settings)
        for rest, out in folds_of(sample.groups, settings.folds, _STACKING_SEED):
            weights = _weights(features[rest], truth[i][rest], settings)
            total[out] += features[out] @ weights
    return mixing, np.clip(mean + total, 0.0, 1.0)


def _weights(
    features: Float64Array, truth: Float64Array, settings: QualitySettings
) -> Float64Array:
    """Non-negative least squares with a small penalty, so that like opinions share the weight."""
    flat = features.reshape(-1, features.shape[2])
    gram = flat.T @ flat
    wanted = flat.T @ truth.ravel()
    gram += (
        settings.stacking_ridge * max(float(np.trace(gram)) / len(gram), 1e-12) * np.eye(len(gram))
    )
    root = np.linalg.cholesky(gram).T
    return np.asarray(nnls(root, np.linalg.solve(root.T, wanted))[0])


def fit_recalibration(quality: Float64Array, score: Float64Array) -> Recalibration:
    """Platt's two numbers by penalised likelihood; fractional scores count as shares.

    One pair for all experts: a pair for each would move the differences between experts, which the
    opinions' weights have fitted already, and with them every route. The slope stays above zero,
    so no pair of experts changes its order.
    """
    inside = np.clip(quality, 0.005, 0.995)
    logit = np.log(inside / (1 - inside))

    def loss(ab: Float64Array) -> float:
        z = ab[0] * logit + ab[1]
        prior = _CALIBRATION_ROWS * ((ab[0] - 1) ** 2 + ab[1] ** 2)
        return float((np.logaddexp(0, z) - score * z).sum() + prior)

    bounds = ((_SLOPE_MIN, None), (None, None))
    slope, intercept = minimize(loss, np.array([1.0, 0.0]), method="L-BFGS-B", bounds=bounds).x
    k = score.shape[1]
    return Recalibration(np.full(k, slope), np.full(k, intercept))
