from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from routers.artifact import TrainingRecord, load_artifact, save_artifact
from routers.classifier import Gates, LinearHead, Mixing, References, RouterModel
from routers.metrics import Metrics
from routers.novelty import Novelty, rescaled
from routers.novelty_fit import fit_novelty
from routers.types import GENERAL

NAMES = ("alpha", "beta", GENERAL)
EXAMPLE = Novelty(general=1.0, other=0.5, nearness=10.0, bias=6.5, share_max=0.3)


def recorded(
    rows: int = 1000, strangers: int = 60, *, strangers_nearer: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Posteriors that do not know a stranger, and cosines that do."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, rows)
    labels[:strangers] = NAMES.index(GENERAL)
    posterior = rng.dirichlet((1.0, 1.0, 0.1), rows)
    known = labels < 2
    posterior[known] = 0.05
    posterior[known, labels[known]] = 0.9
    nearest = rng.normal(0.8, 0.1, rows)
    nearest[~known] += 0.4 if strangers_nearer else -0.4
    return posterior, np.clip(nearest, -1, 1), labels


def router(gates: Gates) -> RouterModel:
    return RouterModel(
        NAMES,
        References(np.eye(3).astype(np.float16), np.arange(3)),
        LinearHead((8 * np.eye(3)).astype(np.float32), np.zeros(3, dtype=np.float32)),
        Mixing(neighbours=1, knn_share=0.5, temperature=1.0),
        gates,
    )


def test_distance_turns_a_stranger_away_that_the_posterior_does_not_know() -> None:
    posterior = np.array([[0.9, 0.05, 0.05], [0.9, 0.05, 0.05]])
    near, far = router(Gates(1.0, -1.0, novelty=EXAMPLE)).decide(posterior, np.array([0.9, 0.3]))
    assert (near.category, near.gate) == ("alpha", None)
    assert (far.category, far.gate, far.best_guess) == (GENERAL, "novelty", "alpha")
    assert far.posterior[GENERAL] > near.posterior[GENERAL]
    assert sum(far.posterior.values()) == pytest.approx(1.0)


def test_gate_keeps_nearly_all_that_was_rightly_guessed_and_stops_most_strangers() -> None:
    posterior, nearest, labels = recorded()
    found = fit_novelty(posterior, nearest, labels, NAMES)
    assert found is not None
    stopped = found.share(posterior, nearest, NAMES) > found.share_max
    strange = labels == NAMES.index(GENERAL)
    right = ~strange & (posterior.argmax(axis=1) == labels)
    assert stopped[right].mean() <= 0.006
    assert stopped[strange].mean() > 0.8


def test_distance_that_does_not_tell_strangers_apart_is_not_used() -> None:
    assert fit_novelty(*recorded(strangers_nearer=True), NAMES) is None


def test_no_signal_makes_a_query_more_familiar_by_being_stranger() -> None:
    found = fit_novelty(*recorded(), NAMES)
    assert found is not None
    assert min(found.general, found.other) >= 0
    assert found.nearness > 0


def test_too_few_general_rows_fit_nothing() -> None:
    assert fit_novelty(*recorded(strangers=19), NAMES) is None
    posterior, nearest, labels = recorded(strangers=0)
    assert fit_novelty(posterior, nearest, labels, ("alpha", "beta", "gamma")) is None


def test_other_categories_keep_their_proportions() -> None:
    posterior = np.array([[0.6, 0.3, 0.1]])
    assert rescaled(posterior, np.array([0.4]), NAMES)[0] == pytest.approx([0.4, 0.2, 0.4])


def test_artifact_keeps_it_and_older_manifests_have_none(tmp_path: Path) -> None:
    metrics = Metrics(0.9, 0.9, 0.9, 0.0, 0.1, {}, {})
    embedder = type("E", (), {"id": "e", "digest": "d", "dimensions": 3})()
    save_artifact(
        tmp_path,
        router(Gates(0.5, 0.1, 0.2, EXAMPLE)),
        created="2026-01-02T03:04:05Z",
        embedder=embedder,
        text_max_chars=2000,
        training=TrainingRecord("abc", 7, {"alpha": 1, "beta": 1, GENERAL: 1}, metrics),
    )
    assert load_artifact(tmp_path).model.gates.novelty == EXAMPLE
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    del manifest["gates"]["novelty"]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert load_artifact(tmp_path).model.gates.novelty is None
