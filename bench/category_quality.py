"""Trains step one on CLINC150's domains; in-scope accuracy and out-of-scope detection on its test.

Wants the data set's two JSON files: ``train``, ``val``, ``test`` and ``oos_*`` lists of [text,
intent], and the intents of each domain (Larson et al. 2019, https://github.com/clinc/oos-eval).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench._report import write
from routers.embedder import load_embedder
from routers.fit import FitSettings, Sample, fit, one_thread
from routers.outcome_train import embedded
from routers.types import GENERAL

_SETTINGS = FitSettings(
    neighbours=(10,), knn_shares=(0.0, 0.25, 0.5), inverse_penalties=(10.0,), iterations_max=300
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("queries", type=Path, help="as in data_full.json")
    parser.add_argument("domains", type=Path, help="as in domains.json")
    parser.add_argument("--train-rows", type=int, default=15_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the result here; - for stdout")
    options = parser.parse_args()
    with one_thread():
        result = measured(options)
    for name, value in result.items():
        print(f"{name:<32}{value:.4f}" if isinstance(value, float) else f"{name:<32}{value}")
    write(result, options.json)


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Train on ``train`` and ``oos_train``, score on ``test`` and ``oos_test``."""
    splits = json.loads(options.queries.read_text())
    domain = {
        intent: name
        for name, intents in json.loads(options.domains.read_text()).items()
        for intent in intents
    }
    rng = np.random.default_rng(options.seed)
    kept = rng.permutation(len(splits["train"]))[: options.train_rows]
    train = [splits["train"][i] for i in sorted(kept)] + splits["oos_train"]
    test = splits["test"] + splits["oos_test"]
    labels, truth = (
        np.array([domain.get(intent, GENERAL) for _, intent in rows]) for rows in (train, test)
    )
    embedder = load_embedder()
    vectors, unseen = (
        embedded([text for text, _ in rows], embedder, lambda *_: None) for rows in (train, test)
    )
    names, index = np.unique(labels, return_inverse=True)
    sample = Sample(
        vectors.astype(np.float16),
        index.astype(np.int64),
        np.arange(len(train)),
        tuple(map(str, names)),
    )
    model = fit(sample, seed=options.seed, settings=_SETTINGS)
    cosines = model.cosines(unseen)
    posterior, nearest = model.posterior_given(unseen, cosines)
    found = model.decide(posterior, nearest)
    decided = np.array([decision.category for decision in found])
    strange = np.array([decision.posterior[GENERAL] for decision in found])
    return _figures(truth, decided, posterior, strange, np.array(model.trained_categories)) | {
        "training_rows": len(train),
        "test_rows": len(test),
        "seed": options.seed,
    }


def _figures(
    truth: NDArray[np.str_],
    decided: NDArray[np.str_],
    posterior: NDArray[np.float64],
    strange: NDArray[np.float64],
    categories: NDArray[np.str_],
) -> dict[str, float]:
    """Accuracy of the likeliest domain, and of the decision with its gates. Out of scope by the
    share ``strange`` that the decision gives ``general``, and, beside it, by one less the largest
    share of a domain in step one's posterior."""
    inside = truth != GENERAL
    domains = categories != GENERAL
    likeliest = categories[domains][posterior[:, domains].argmax(axis=1)]
    alone = 1.0 - posterior[:, domains].max(axis=1)
    return {
        "in_scope_accuracy": float((likeliest == truth)[inside].mean()),
        "in_scope_accuracy_with_gates": float((decided == truth)[inside].mean()),
        "out_of_scope_turned_away": float((decided == GENERAL)[~inside].mean()),
        "out_of_scope_auroc": float(roc_auc_score(~inside, strange)),
        "out_of_scope_auroc_of_posterior_alone": float(roc_auc_score(~inside, alone)),
    }


if __name__ == "__main__":
    main()
