"""The shipped artifact is what the public training makes of the shipped prompts."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from routers.artifact import load_artifact
from routers.embedder import load_embedder
from routers.train import train

DATA = Path(str(resources.files("routers"))) / "data" / "quickstart"


def test_training_again_gives_the_shipped_artifact(tmp_path: Path) -> None:
    shipped = load_artifact(DATA / "artifact")
    stages: list[tuple[str, int, int]] = []
    report = train(
        DATA / "prompts.jsonl",
        tmp_path,
        seed=shipped.manifest.training.seed,
        created=shipped.manifest.created,
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    again = load_artifact(tmp_path)
    assert again.manifest.training.data_digest == shipped.manifest.training.data_digest
    assert report.artifact_digest == again.digest
    np.testing.assert_array_equal(again.model.references.labels, shipped.model.references.labels)
    # Processors differ in the last bits of a sum; the fit passes them on a little enlarged.
    np.testing.assert_allclose(
        again.model.references.vectors, shipped.model.references.vectors, atol=2e-3
    )
    np.testing.assert_allclose(again.model.head.weights, shipped.model.head.weights, atol=5e-2)
    lines = (DATA / "heldout.jsonl").read_text().splitlines()
    heldout = [json.loads(line)["prompt"] for line in lines]
    queries = load_embedder(shipped.manifest.embedder.id).embed(heldout)
    decided = zip(again.model.classify(queries), shipped.model.classify(queries), strict=True)
    assert np.mean([new.category == old.category for new, old in decided]) >= 0.97
    assert report.metrics.accuracy == pytest.approx(
        shipped.manifest.training.metrics.accuracy, abs=0.01
    )
    assert [s for s, done, total in stages if done == total] == [
        "embed",
        "cross-validate",
        "fit",
        "write",
    ]
