from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from experts.errors import ArtifactError, QueueFull
from routers.artifact import TrainingRecord, load_artifact, save_artifact
from routers.classifier import Gates, LinearHead, Mixing, References, RouterModel
from routers.embedder import Float32Array
from routers.metrics import Metrics
from routers.router import SemanticRouter
from routers.types import GENERAL

WORDS = ("sql", "json", "hello")


class WordEmbedder:
    """One axis per known word; a text with none of them lies between all axes."""

    id = "minilm-int8:48"
    digest = "words"
    dimensions = 3

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def embed(self, texts: Sequence[str]) -> Float32Array:
        assert self.gate.wait(10)
        self.seen.extend(texts)
        if self.error:
            raise self.error
        rows = np.array([[word in text for word in WORDS] for text in texts], dtype=np.float32)
        rows[rows.sum(axis=1) == 0] = 1.0
        unit: Float32Array = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        return unit.astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    eye = np.eye(3)
    save_artifact(
        tmp_path,
        RouterModel(
            ("sql", "json", GENERAL),
            References(eye.astype(np.float16), np.arange(3)),
            LinearHead((9 * eye).astype(np.float32), np.zeros(3, dtype=np.float32)),
            Mixing(1, 0.5, 1.0),
            Gates(0.4, 0.5),
        ),
        created="2026-01-01T00:00:00Z",
        embedder=WordEmbedder(),
        text_max_chars=100,
        training=TrainingRecord("x", 0, {}, Metrics(1, 1, 1, 0, 0, {}, {})),
    )
    return tmp_path


@pytest.fixture
async def embedder() -> AsyncIterator[WordEmbedder]:
    made = WordEmbedder()
    yield made
    made.gate.set()


def loaded(folder: Path, embedder: WordEmbedder, **options: int) -> SemanticRouter:
    router = SemanticRouter.load(folder, embedder=embedder, **options)  # type: ignore[arg-type]
    embedder.seen.clear()
    return router


async def test_decides_and_explains(folder: Path, embedder: WordEmbedder) -> None:
    router = loaded(folder, embedder)
    answer = await router.classify("some sql")
    unsure = await router.classify("sql and json")
    await router.aclose()
    assert (answer.category, answer.gate, answer.cached) == ("sql", None, False)
    assert (unsure.category, unsure.gate) == (GENERAL, "entropy")
    assert router.categories == ("sql", "json", GENERAL)
    assert router.artifact_digest == load_artifact(folder).digest


async def test_repeat_is_answered_from_the_cache(folder: Path, embedder: WordEmbedder) -> None:
    router = loaded(folder, embedder)
    first = await router.classify("some sql")
    again = await router.classify("  some\u200b   sql ")
    await router.aclose()
    assert embedder.seen == ["some sql"]
    assert again.cached
    assert (again.category, again.posterior) == (first.category, first.posterior)


async def test_cache_forgets_the_least_recently_used(folder: Path, embedder: WordEmbedder) -> None:
    router = loaded(folder, embedder, cache_entries=2)
    for text in ("a", "b", "a", "c", "a", "b"):
        await router.classify(text)
    await router.aclose()
    assert embedder.seen == ["a", "b", "c", "b"]


async def test_prompts_that_differ_only_in_a_cut_middle_are_one(
    folder: Path, embedder: WordEmbedder
) -> None:
    router = loaded(folder, embedder)
    for filler in ("x", "y"):
        await router.classify("a" * 100 + filler * 1_000 + "b" * 100)
    await router.aclose()
    assert len(embedder.seen) == 1


async def test_concurrent_equal_prompts_share_one_computation(
    folder: Path, embedder: WordEmbedder
) -> None:
    router = loaded(folder, embedder, cache_entries=0)
    answers = await asyncio.gather(*[router.classify("sql") for _ in range(50)])
    await router.aclose()
    assert embedder.seen == ["sql"]
    assert {a.category for a in answers} == {"sql"}


async def test_event_loop_runs_on_while_the_embedder_works(
    folder: Path, embedder: WordEmbedder
) -> None:
    router = loaded(folder, embedder)
    embedder.gate.clear()
    task = asyncio.create_task(router.classify("sql"))
    for _ in range(100):
        await asyncio.sleep(0)
    assert not task.done()
    embedder.gate.set()
    assert (await task).category == "sql"
    await router.aclose()


async def test_one_cancelled_caller_leaves_the_others_their_answer(
    folder: Path, embedder: WordEmbedder
) -> None:
    router = loaded(folder, embedder)
    embedder.gate.clear()
    leaving = asyncio.create_task(router.classify("sql"))
    staying = asyncio.create_task(router.classify("sql"))
    await asyncio.sleep(0)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    embedder.gate.set()
    assert (await staying).category == "sql"
    await router.aclose()


async def test_newcomer_does_not_join_an_abandoned_computation(
    folder: Path, embedder: WordEmbedder
) -> None:
    router = loaded(folder, embedder)
    embedder.gate.clear()
    leaving = asyncio.create_task(router.classify("sql"))
    await asyncio.sleep(0)
    leaving.cancel()
    newcomer = asyncio.create_task(router.classify("sql"))  # runs right after the cancellation
    await asyncio.wait([leaving])
    embedder.gate.set()
    assert (await newcomer).category == "sql"
    await router.aclose()


async def test_full_queue_is_refused_but_equal_prompts_still_join(
    folder: Path, embedder: WordEmbedder
) -> None:
    router = loaded(folder, embedder, queue_max=1)
    embedder.gate.clear()
    waiting = asyncio.create_task(router.classify("sql"))
    await asyncio.sleep(0)
    joined = asyncio.create_task(router.classify("sql"))
    with pytest.raises(QueueFull):
        await router.classify("json")
    embedder.gate.set()
    assert (await waiting).category == (await joined).category == "sql"
    await router.aclose()


async def test_errors_are_not_cached(folder: Path, embedder: WordEmbedder) -> None:
    router = loaded(folder, embedder)
    embedder.error = MemoryError("no room")
    with pytest.raises(MemoryError):
        await router.classify("sql")
    embedder.error = None
    assert (await router.classify("sql")).category == "sql"
    await router.aclose()


async def test_closed_router_refuses_new_queries(folder: Path, embedder: WordEmbedder) -> None:
    router = loaded(folder, embedder)
    accepted = asyncio.create_task(router.classify("sql"))
    await asyncio.sleep(0)
    await router.aclose()
    assert (await accepted).category == "sql"
    with pytest.raises(RuntimeError, match="closed"):
        await router.classify("json")


async def test_embedder_that_does_not_fit_is_refused(folder: Path, embedder: WordEmbedder) -> None:
    embedder.digest = "others"
    with pytest.raises(ArtifactError, match="artifact words, here others"):
        SemanticRouter.load(folder, embedder=embedder)
