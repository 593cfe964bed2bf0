"""Fit a ``QualityModel``: opinions on folds, their weights on what those folds left out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from routers.features import Vocabulary, fit_vocabulary
from routers.fit import log_loss
from routers.forest import fit_forest
from routers.quality import (
    COMPONENTS,
    Clusters,
    Costs,
    Linear,
    Neighbours,
    Projection,
    QualityModel,
    Recalibration,
    TextFeatures,
    Topics,
    blended_topics,
    contrasts,
)
from routers.quality_blend import blended, fit_recalibration, opinions_gain
from routers.quality_sample import OutcomeSample, QualitySettings, folds_of
from routers.ridge import Design, design, fit_dense_scale, ridge
from routers.trees import fit_trees

__all__ = ["OutOfFold", "OutcomeSample", "QualitySettings", "fit_quality"]

Float64Array = NDArray[np.float64]
Float32Array = NDArray[np.float32]
IntArray = NDArray[np.int64]
Progress = Callable[[int, int], None]

_COST_PENALTY: Final = 1.0
_TOPIC_START: Final = (8.0, 0.2)


@dataclass(frozen=True, slots=True)
class OutOfFold:
    """Estimates [n, k] for the training rows by models that did not see them.

    ``gain`` says by how much each opinion lowers the squared error of the differences between
    experts below the category table's, with its standard error; ``admitted`` names the opinions
    that got weight.
    """

    quality: Float64Array
    table: Float64Array
    cost: Float64Array
    gain: dict[str, tuple[float, float]]
    admitted: tuple[str, ...]


def fit_quality(
    sample: OutcomeSample,
    posterior: Float64Array,
    *,
    seed: int,
    settings: QualitySettings | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[QualityModel, OutOfFold]:
    """Fit opinions, weights and calibration. Deterministic for a seed.

    ``posterior`` [n, c] must be out-of-fold too. An opinion is used only if the weighted sum with
    it beats the category table alone on rows that neither was fitted on. How far the estimate then
    leaves the table is shrunk, not decided: the share of the way comes from the same rows. If no
    step helps, the model is the table; if the table does not beat each expert's mean, that mean.
    """
    settings = settings or QualitySettings()
    held, costs, strength, share = _held_out_opinions(sample, posterior, seed, settings, progress)
    mean = sample.score.mean(axis=0)
    gain = opinions_gain(held, sample, mean, settings)
    names = ["table", *(name for name, (gained, _) in gain.items() if gained > 0)]
    blend = blended({n: held[n] for n in names}, sample, mean, settings)
    gain["all admitted"] = blend.gain
    if blend.share == 0:
        names = ["table"]
    parts = _fit_parts(sample, posterior, seed, settings, names)
    recalibration = fit_recalibration(blend.quality, sample.score)
    topics = replace(parts.topics, strength=strength, share=share)
    model = replace(parts, mixing=blend.mixing, recalibration=recalibration, topics=topics)
    progress(settings.folds + 1, settings.folds + 1)
    quality = recalibration.apply(blend.quality)
    return model, OutOfFold(quality, held["table"], costs, gain, tuple(names))


def _held_out_opinions(
    sample: OutcomeSample,
    posterior: Float64Array,
    seed: int,
    settings: QualitySettings,
    progress: Progress,
) -> tuple[dict[str, Float64Array], Float64Array, float, float]:
    """Opinions and costs [n, k] by models that did not see the row, and how to blend topics."""
    held: dict[str, Float64Array] = {n: np.zeros_like(sample.score) for n in COMPONENTS}
    costs = np.zeros_like(sample.cost)
    topics = np.zeros((len(posterior), len(sample.parent)))
    tables: list[tuple[IntArray, Float64Array]] = []
    for done, (rest, out) in enumerate(folds_of(sample.groups, settings.folds, seed)):
        progress(done, settings.folds + 1)
        parts = _fit_parts(sample.rows(rest), posterior[rest], seed, settings, COMPONENTS)
        rows = sample.rows(out)
        vectors = rows.vectors.astype(np.float32)
        text = _text_features(rows, parts.vocabulary)
        cosines = vectors @ sample.vectors[rest].astype(np.float32).T
        for name, scores in parts.opinions(vectors, text, posterior[out], cosines).items():
            held[name][out] = scores
        costs[out] = parts.cost(vectors, text)
        topics[out] = parts.topics.scores(parts.scale.dense(vectors, text.signs), text)
        tables.append((out, parts.table))
    first = posterior[:, sample.parent]
    strength, share = _fit_topic_blend(topics, first, sample.labels)
    sharpened = blended_topics(topics, first, strength, share)
    for out, table in tables:
        held["table"][out] = sharpened[out] @ table
    return held, costs, strength, share


def _fit_topic_blend(
    scores: Float64Array, first: Float64Array, labels: IntArray
) -> tuple[float, float]:
    """Strength and share with the least log loss."""

    def loss(at: Float64Array) -> float:
        blended = blended_topics(scores, first, abs(float(at[0])), abs(float(at[1])))
        return log_loss(blended, labels)

    found = minimize(loss, np.array(_TOPIC_START), method="Nelder-Mead", options={"maxiter": 40}).x
    return abs(float(found[0])), abs(float(found[1]))


def _text_features(sample: OutcomeSample, vocabulary: Vocabulary) -> TextFeatures:
    weighed = [vocabulary.weigh(text) for text in sample.texts]
    return TextFeatures(sample.signs, tuple(c for c, _ in weighed), tuple(w for _, w in weighed))


def _fit_parts(
    sample: OutcomeSample,
    posterior: Float64Array,
    seed: int,
    settings: QualitySettings,
    names: Sequence[str],
) -> QualityModel:
    """Every opinion of ``names``, with equal weights and no calibration."""
    k = len(sample.experts)
    mean = sample.score.mean(axis=0)
    table = _table(sample, mean, settings)
    vocabulary = fit_vocabulary(sample.texts)
    scale = fit_dense_scale(sample.signs)
    vectors = sample.vectors.astype(np.float32)
    rows = design(vocabulary, sample.texts, scale.dense(vectors, sample.signs))
    linear, denoised, topics = _fit_linear(rows, sample, table, settings, names)
    projection = trees = forest = None
    if "trees" in names or "forest" in names:
        projection = _fit_projection(rows, vectors, settings, seed)
        seen = projection.rows(vectors, _text_features(sample, vocabulary))
        targets = np.hstack(contrasts(sample.score))
        if "trees" in names:
            trees = fit_trees(seen, targets, seed)
        if "forest" in names:
            forest = fit_forest(np.hstack([seen, posterior]), targets, seed)
    return QualityModel(
        experts=sample.experts,
        vocabulary=vocabulary,
        scale=scale,
        mean=mean,
        table=table,
        topics=topics,
        linear=linear,
        denoised=denoised,
        neighbours=Neighbours(
            sample.score[sample.references].astype(np.float16), settings.neighbours
        )
        if "neighbours" in names
        else None,
        clusters=_fit_clusters(vectors, sample.score, mean, seed, settings)
        if "clusters" in names
        else None,
        projection=projection,
        trees=trees,
        forest=forest,
        mixing=np.ones((2, len(COMPONENTS))),
        recalibration=Recalibration(np.ones(k), np.zeros(k)),
        costs=_fit_costs(rows.dense, sample.cost),
    )


def _table(sample: OutcomeSample, mean: Float64Array, settings: QualitySettings) -> Float64Array:
    """[t, k] mean score by topic, shrunk to its category's, that one to the mean over all."""
    n, categories = len(sample.score), int(sample.parent.max()) + 1
    others = (n * mean - sample.score) / max(n - 1, 1)
    by_category, without_row = _shrunk_means(
        sample.parent[sample.labels], sample.score, np.tile(mean, (categories, 1)), others, settings
    )
    return _shrunk_means(
        sample.labels, sample.score, by_category[sample.parent], without_row, settings
    )[0]


def _shrunk_means(
    labels: IntArray,
    score: Float64Array,
    towards: Float64Array,
    towards_without_row: Float64Array,
    settings: QualitySettings,
) -> tuple[Float64Array, Float64Array]:
    """[groups, k] means of ``score`` [n, k] with pseudo rows of ``towards`` added, and for each row
    [n, k] the mean of its group without it.

    The number of pseudo rows is the one whose means without the row are nearest to the row, in the
    differences between experts: parts of a category that differ by luck only are pulled together,
    parts that differ indeed are not.
    """
    counts = np.bincount(labels, minlength=len(towards)).astype(np.float64)[:, None]
    sums = np.zeros_like(towards)
    np.add.at(sums, labels, score)
    truth = contrasts(score)[1]

    def without_row(pseudo: float) -> Float64Array:
        rest: Float64Array = sums[labels] - score + pseudo * towards_without_row
        return rest / (counts[labels] - 1 + pseudo)

    def error(pseudo: float) -> float:
        return float(((contrasts(without_row(pseudo))[1] - truth) ** 2).mean())

    best = min(settings.table_pseudo_counts, key=error)
    return (sums + best * towards) / (counts + best), without_row(best)


def _fit_linear(
    rows: Design,
    sample: OutcomeSample,
    table: Float64Array,
    settings: QualitySettings,
    names: Sequence[str],
) -> tuple[Linear | None, Linear | None, Topics]:
    """Three maps in one solve. ``linear``: outcomes themselves. ``denoised``: the category's mean
    outcome, which has no noise of its own and so bears a light penalty, plus what is left, under a
    heavy one. Topics: the labels."""
    k = len(sample.experts)
    smooth = table[sample.labels]
    classes = np.eye(len(sample.parent))[sample.labels]
    targets = np.hstack([sample.score, smooth, sample.score - smooth, classes])
    strengths = (settings.penalty, settings.denoised_penalty, settings.residual_penalty)
    penalties = [np.repeat(strengths, k), np.full(classes.shape[1], settings.topic_penalty)]
    weights, bias = ridge(rows, targets, np.concatenate(penalties))
    v = rows.text.shape[1]
    whole = weights[:, k : 2 * k] + weights[:, 2 * k : 3 * k]
    linear = Linear(weights[:v, :k], weights[v:, :k], bias[:k])
    denoised = Linear(whole[:v], whole[v:], bias[k : 2 * k] + bias[2 * k : 3 * k])
    topics = Topics(
        weights[:v, 3 * k :].astype(np.float16),
        weights[v:, 3 * k :],
        bias[3 * k :],
        sample.parent,
        *_TOPIC_START,
    )
    return (
        linear if "linear" in names else None,
        denoised if "denoised" in names else None,
        topics,
    )


def _fit_projection(
    rows: Design, vectors: Float32Array, settings: QualitySettings, seed: int
) -> Projection:
    from sklearn.decomposition import TruncatedSVD

    text = TruncatedSVD(
        min(settings.text_components, min(rows.text.shape) - 1), random_state=seed
    ).fit(rows.text)
    _, _, axes = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    return Projection(
        np.ascontiguousarray(axes[: settings.embedding_components].T, dtype=np.float32),
        np.ascontiguousarray(text.components_.T, dtype=np.float32),
    )


def _fit_clusters(
    vectors: Float32Array,
    score: Float64Array,
    mean: Float64Array,
    seed: int,
    settings: QualitySettings,
) -> Clusters:
    from sklearn.cluster import KMeans

    count = max(2, min(settings.clusters_max, len(vectors) // 40))
    labels = KMeans(count, n_init=1, random_state=seed).fit(vectors).labels_
    sums, centres = np.zeros((count, score.shape[1])), np.zeros((count, vectors.shape[1]))
    np.add.at(sums, labels, score)
    np.add.at(centres, labels, vectors)
    size = np.bincount(labels, minlength=count)[:, None]
    pseudo = settings.cluster_pseudo_counts
    centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-9)
    return Clusters(centres.astype(np.float32), (sums + pseudo * mean) / (size + pseudo))


def _fit_costs(dense: Float32Array, cost: Float64Array) -> Costs:
    """Least squares of log cost, under a light penalty; an expert of one price has no slope."""
    means = cost.mean(axis=0)
    varies = (np.ptp(cost, axis=0) > 1e-9 * np.maximum(means, 1e-300)) & (means > 0)
    floor = np.maximum(1e-3 * means, 1e-300)
    logs = np.log(np.maximum(cost, floor))
    centre = dense.mean(axis=0)
    inside = (dense - centre).astype(np.float64)
    gram = inside.T @ inside + _COST_PENALTY * np.eye(inside.shape[1])
    weights = np.linalg.solve(gram, inside.T @ (logs - logs.mean(axis=0))) * varies
    bias = np.where(varies, logs.mean(axis=0) - centre @ weights, 0.0)
    raw = np.exp(dense @ weights + bias)
    return Costs(weights, bias, means / raw.mean(axis=0))
