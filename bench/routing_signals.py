"""How much of what makes one expert better than another can be told from a prompt, and by whom.

    python bench/routing_signals.py FOLDER [--sets a,b] [--splits 3] [--budgets 31,54] [--json FILE]

What decides a route is each expert's score less the query's mean over experts. ``explained`` is the
share of its variance on held-out rows (R², against each expert's training mean) that is told by the
true category's and source's training means, by the router, by each of its opinions, and by a
learner that is not in it: kernel ridge regression on everything that the router reads. The kernel's
settings, and its weight beside the router (``router_and_kernel``), are the best by the held-out
rows themselves: were there a signal left in these features, it would show.

``if_more_were_told`` is what an aim would take: the figures of the router, were an estimate added
that explains this much of what the router leaves unexplained, with normal, independent errors.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve
from scipy.sparse import csr_matrix

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import _report
from bench.routing_ceilings import figures_of, labels_of, mean_figures
from bench.routing_quality import Remembering
from gateway.evaluation.evaluate import split_by_prompt
from policies.frontier import solve_frontier
from policies.mapping import category_table
from routers.embedder import DEFAULT_EMBEDDER, Embedder, load_embedder
from routers.outcome_train import TrainedRouter, train_on_outcomes
from routers.outcomes import Outcomes, holds_outcomes, read_outcomes
from routers.quality import contrasts, text_features

FloatArray = NDArray[np.float64]
Figures = dict[str, Any]

_SHAPES: Final = ((0.0, 2.0), (0.0, 5.0), (1.0, 1.0), (1.0, 3.0))  # of word pairs; sharpness
_PENALTIES: Final = (3.0, 10.0, 30.0)
_MORE: Final = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1)
_DRAWS: Final = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="folder of data-set folders")
    parser.add_argument("--sets", default="", help="names, separated by commas (default: all)")
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--holdout", type=float, default=0.3)
    parser.add_argument("--budgets", default="", help="as in 31,54")
    parser.add_argument("--json", metavar="FILE", help="- for standard output")
    options = parser.parse_args()
    wanted = set(filter(None, options.sets.split(",")))
    budgets = tuple(float(budget) for budget in options.budgets.split(",") if budget)
    embedder = Remembering(load_embedder(DEFAULT_EMBEDDER))
    result = {}
    for folder in sorted(options.data.iterdir()):
        if not holds_outcomes(folder) or (wanted and folder.name not in wanted):
            continue
        data = read_outcomes(folder)
        rows = []
        for seed in range(options.splits):
            print(f"{folder.name}: split {seed + 1} of {options.splits}", file=sys.stderr)
            rest, held = split_by_prompt(data, options.holdout, seed)
            rows.append(signals(data.rows(rest), data.rows(held), embedder, seed, budgets))
        result[folder.name] = {part: mean_figures([row[part] for row in rows]) for part in rows[0]}
        for part, figures in result[folder.name].items():
            cells = ", ".join(f"{key} {value:.4f}" for key, value in figures.items())
            print(f"{folder.name:<22}{part:<30}{cells}")
    _report.write({"sets": result, "splits": options.splits}, options.json)


def signals(
    train: Outcomes, test: Outcomes, embedder: Embedder, seed: int, budgets: Sequence[float]
) -> Figures:
    """One split."""
    trained = train_on_outcomes(train, embedder, seed=seed, progress=lambda *_: None)
    told = dict(_told(train, test))
    own, cost, opinions = _router(trained, test, embedder)
    kernel, both = _kernel(trained, train, test, embedder, own)
    means = train.score.mean(axis=0)
    estimates = {**told, "router": own, **opinions, "kernel_ridge": kernel}
    shares = {name: explained(values, test.score, means) for name, values in estimates.items()} | {
        "router_and_kernel": explained(both, test.score, means)
    }
    return {
        "explained": shares,
        "best_score_minus_best_single": {
            name: _gain(values, test.score, means) for name, values in estimates.items()
        },
        **{
            f"if_{share:g}_more_were_told": _with_more(
                trained, own, cost, train, test, budgets, share, seed
            )
            for share in _MORE
        },
    }


# --- estimates on the held-out rows ---------------------------------------------------------------


def _told(train: Outcomes, test: Outcomes) -> Iterator[tuple[str, FloatArray]]:
    for level, (known, asked) in labels_of(train, test).items():
        count = int(max(known.max(), asked.max())) + 1
        yield f"told_{level}", category_table(known, train.score, count)[0][asked]


def _router(
    trained: TrainedRouter, test: Outcomes, embedder: Embedder
) -> tuple[FloatArray, FloatArray, dict[str, FloatArray]]:
    """Estimates of quality and cost, and the opinions behind the first."""
    vectors, model = embedder.embed(test.texts), trained.quality
    cosines = trained.classifier.cosines(vectors)
    posterior, _ = trained.classifier.posterior_given(vectors, cosines)
    features = text_features(test.texts, model.vocabulary)
    opinions = model.opinions(vectors, features, posterior, cosines)
    named = {f"opinion_{name}": values for name, values in opinions.items()}
    return model.estimate(opinions, posterior), model.cost(vectors, features), named


def _kernel(
    trained: TrainedRouter,
    train: Outcomes,
    test: Outcomes,
    embedder: Embedder,
    own: FloatArray,
) -> tuple[FloatArray, FloatArray]:
    """The best setting by the held-out rows, and the router moved towards the one, and as far, as
    is best by them."""
    known, asked = (_features(trained, part, embedder) for part in (train, test))
    means = train.score.mean(axis=0)
    best: tuple[float, FloatArray] = (-np.inf, own)
    both: tuple[float, FloatArray] = (-np.inf, own)
    for share, sharpness in _SHAPES:
        within = _similarity(known, known, share, sharpness).astype(np.float64)
        across = _similarity(asked, known, share, sharpness).astype(np.float64)
        for penalty in _PENALTIES:
            system = within + penalty * np.eye(len(within))
            found = means + across @ solve(system, train.score - means, assume_a="pos")
            best = max(best, (explained(found, test.score, means), found), key=lambda one: one[0])
            moved = own + _weight(own, found, test.score) * (found - own)
            both = max(both, (explained(moved, test.score, means), moved), key=lambda one: one[0])
    return best[1], both[1]


def _features(trained: TrainedRouter, rows: Outcomes, embedder: Embedder) -> tuple[Any, Any]:
    """Embedding and scaled signs [n, d + p], and word pairs [n, v]."""
    model = trained.quality
    found = text_features(rows.texts, model.vocabulary)
    starts = np.cumsum([0, *(len(columns) for columns in found.columns)])
    parts = np.concatenate(found.weights), np.concatenate(found.columns), starts
    shape = (len(rows), len(model.vocabulary.ids))
    return model.scale.dense(embedder.embed(rows.texts), found.signs), csr_matrix(parts, shape)


def _similarity(a: tuple[Any, Any], b: tuple[Any, Any], share: float, sharpness: float) -> Any:
    """exp(sharpness · -|a - b|² / 2), word pairs counting ``share``; [n, m]."""
    squares = [((part[0] ** 2).sum(axis=1) + share) / 2.0 for part in (a, b)]
    inner = a[0] @ b[0].T
    if share:
        inner = inner + share * (a[1] @ b[1].T).toarray()
    return np.exp(sharpness * (inner - squares[0][:, None] - squares[1][None, :]))


# --- figures --------------------------------------------------------------------------------------


def explained(quality: FloatArray, score: FloatArray, means: FloatArray) -> float:
    """R² of the differences between experts, [n, k] each, against the constant ``means`` [k]."""
    truth = contrasts(score)[1]
    missed = ((contrasts(quality)[1] - truth) ** 2).sum()
    return float(1.0 - missed / ((contrasts(means[None])[1] - truth) ** 2).sum())


def _weight(own: FloatArray, other: FloatArray, score: FloatArray) -> float:
    """Least squares, never away from the other."""
    step = contrasts(other - own)[1]
    left = contrasts(score - own)[1]
    return max(0.0, float((step * left).sum() / max((step**2).sum(), 1e-12)))


def _gain(quality: FloatArray, score: FloatArray, means: FloatArray) -> float:
    rows = np.arange(len(score))
    return float((score[rows, quality.argmax(axis=1)] - score[:, means.argmax()]).mean())


def _with_more(
    trained: TrainedRouter,
    own: FloatArray,
    cost: FloatArray,
    train: Outcomes,
    test: Outcomes,
    budgets: Sequence[float],
    share: float,
    seed: int,
) -> dict[str, float]:
    """The router's figures with the better estimates on training and on held-out rows."""
    known = trained.evidence
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(_DRAWS if share else 1):
        seen = _bettered(known.quality, known.score, share, rng)
        asked = _bettered(own, test.score, share, rng)
        corners = solve_frontier(seen, known.expected_cost, known.score, known.cost)
        found.append(figures_of(asked, cost, corners, train, test, budgets))
    return {key: float(np.mean([one[key] for one in found])) for key in found[0]}


def _bettered(
    own: FloatArray, score: FloatArray, share: float, rng: np.random.Generator
) -> FloatArray:
    """a·residual + √(a(1-a))·noise of the residual's size is the estimate with R² = a of it."""
    residual = contrasts(score - own)[1]
    size = np.sqrt((residual**2).mean() * share * (1.0 - share))
    noise = contrasts(rng.normal(0.0, 1.0, score.shape))[1]
    scale = np.sqrt(score.shape[1] / (score.shape[1] - 1))  # what taking the mean off took away
    bettered: FloatArray = own + share * residual + scale * size * noise
    return bettered


if __name__ == "__main__":
    main()
