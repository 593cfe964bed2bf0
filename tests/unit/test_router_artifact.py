from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experts.errors import ArtifactError
from routers.artifact import TrainingRecord, check_embedder, load_artifact, save_artifact
from routers.classifier import Gates, LinearHead, Mixing, References, RouterModel
from routers.metrics import Metrics


class NamedEmbedder:
    def __init__(self, id: str = "minilm-int8:48", digest: str = "d1", dimensions: int = 3) -> None:
        self.id, self.digest, self.dimensions = id, digest, dimensions

    def embed(self, texts: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float32]]:
        raise AssertionError("an artifact never embeds")


def example_model(seed: int = 0) -> RouterModel:
    rng = np.random.default_rng(seed)
    return RouterModel(
        ("general", "sql"),
        References(rng.normal(size=(4, 3)).astype(np.float16), np.array([0, 1, 1, 0])),
        LinearHead(rng.normal(size=(3, 2)).astype(np.float32), np.ones(2, dtype=np.float32)),
        Mixing(3, 0.25, 0.7),
        Gates(0.5, 0.3),
    )


def save(folder: Path, model: RouterModel | None = None) -> str:
    metrics = Metrics(0.9, 0.95, 0.92, 0.01, 0.2, {"entropy": 0.1}, {"general": 1.0, "sql": 0.8})
    return save_artifact(
        folder,
        model or example_model(),
        created="2026-01-02T03:04:05Z",
        embedder=NamedEmbedder(),
        text_max_chars=2000,
        training=TrainingRecord("abc", 7, {"general": 2, "sql": 2}, metrics),
    )


def edit_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_round_trip_is_exact(tmp_path: Path) -> None:
    model = example_model()
    digest = save(tmp_path, model)
    loaded = load_artifact(tmp_path)
    assert loaded.digest == digest
    assert loaded.model.mixing == model.mixing
    assert loaded.model.gates == model.gates
    assert loaded.manifest.training.metrics.recall == {"general": 1.0, "sql": 0.8}
    np.testing.assert_array_equal(loaded.model.references.vectors, model.references.vectors)
    np.testing.assert_array_equal(loaded.model.references.labels, model.references.labels)
    np.testing.assert_array_equal(loaded.model.head.weights, model.head.weights)
    np.testing.assert_array_equal(loaded.model.head.bias, model.head.bias)


def test_two_writes_are_equal_byte_for_byte(tmp_path: Path) -> None:
    save(tmp_path / "a")
    save(tmp_path / "b")
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert len(files) == 2
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_writing_again_leaves_only_the_new_artifact(tmp_path: Path) -> None:
    save(tmp_path, example_model(1))
    digest = save(tmp_path, example_model(2))
    assert load_artifact(tmp_path).digest == digest
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failure_before_the_manifest_leaves_the_old_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = save(tmp_path, example_model(1))
    replace = Path.replace

    def fail_on_manifest(self: Path, target: Path) -> Path:
        if target.name == "manifest.json":
            raise OSError("disk full")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_on_manifest)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, example_model(2))
    assert load_artifact(tmp_path).digest == digest
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("embedder", "differences"),
    [
        (NamedEmbedder(digest="d2"), {"embedder digest"}),
        (NamedEmbedder(id="minilm-int8:128"), {"embedder id"}),
        (NamedEmbedder(id="sentence-transformers:x", dimensions=4), {"embedder id", "dimensions"}),
    ],
)
def test_another_embedder_is_refused_with_the_difference(
    tmp_path: Path, embedder: NamedEmbedder, differences: set[str]
) -> None:
    save(tmp_path)
    manifest = load_artifact(tmp_path).manifest
    check_embedder(tmp_path, manifest, NamedEmbedder())
    with pytest.raises(ArtifactError) as caught:
        check_embedder(tmp_path, manifest, embedder)
    assert set(caught.value.differences) == differences


def test_another_format_is_refused_with_both_numbers(tmp_path: Path) -> None:
    save(tmp_path)
    edit_manifest(tmp_path, format=2, something_new=True)
    with pytest.raises(ArtifactError) as caught:
        load_artifact(tmp_path)
    assert caught.value.differences == {"format": "artifact 2, here 1"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"surprise": 1}, "surprise"),
        ({"categories": ["general", "sql", "json"]}, "weights"),
        ({"categories": ["sql", "sql"]}, "named once"),
        ({"arrays_digest": "0" * 64}, "arrays digest"),
        ({"arrays_file": "../arrays.npz"}, "outside"),
        ({"arrays_file": "arrays-x.npz"}, "missing"),
    ],
)
def test_a_manifest_that_disagrees_is_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    save(tmp_path)
    edit_manifest(tmp_path, **changes)
    with pytest.raises(ArtifactError, match=words):
        load_artifact(tmp_path)


def test_pickled_arrays_are_never_loaded(tmp_path: Path) -> None:
    save(tmp_path)
    file = tmp_path / load_artifact(tmp_path).manifest.arrays_file
    np.savez(file, vectors=np.array([object()], dtype=object))
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_artifact(tmp_path)


def test_truncated_arrays_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="coe train"):
        load_artifact(tmp_path)
    save(tmp_path)
    file = tmp_path / load_artifact(tmp_path).manifest.arrays_file
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_artifact(tmp_path)
