"""The serving side of step one: text in, gated category out, off the event loop and cached."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from routers.artifact import Artifact, check_embedder, load_artifact
from routers.batching import MicroBatcher
from routers.embedder import AblatingEmbedder, Embedder, Float32Array, load_embedder
from routers.estimate import classify_with_quality
from routers.text import routing_text
from routers.types import Classification, QueryRouter

__all__ = ["SemanticRouter"]

_NAME = "router"


@dataclass(slots=True)
class _Shared:
    """One computation and the number of callers that still want it."""

    future: asyncio.Future[Classification]
    waiters: int = 0


class SemanticRouter(QueryRouter):
    """A ``QueryRouter`` over a trained artifact. Use it from one event loop.

    Embedding and classification run on one worker thread, in micro-batches. Equal prompts that are
    asked at the same time share one computation; the last ``cache_entries`` answers are kept,
    keyed by a digest, so no prompt is stored.
    """

    def __init__(
        self,
        artifact: Artifact,
        embedder: Embedder,
        *,
        max_batch: int = 32,
        max_wait_ms: float = 1.0,
        cache_entries: int = 10_000,
        queue_max: int = 1024,
    ) -> None:
        if cache_entries < 0:
            raise ValueError("cache_entries must not be negative")
        self._artifact = artifact
        self._embedder = embedder
        self._cache_entries = cache_entries
        self._cache: OrderedDict[bytes, Classification] = OrderedDict()
        self._in_flight: dict[bytes, _Shared] = {}
        self._batcher: MicroBatcher[str, Classification] = MicroBatcher(
            self._classify_batch,
            name=_NAME,
            max_batch=max_batch,
            max_wait_ms=max_wait_ms,
            queue_max=queue_max,
        )

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        embedder: Embedder | None = None,
        max_batch: int = 32,
        max_wait_ms: float = 1.0,
        cache_entries: int = 10_000,
        queue_max: int = 1024,
    ) -> SemanticRouter:
        """Load an artifact folder and the embedder it names (or check the one given); blocking.

        Raises ArtifactError when the artifact or the embedder does not fit.
        """
        artifact = load_artifact(path)
        chosen = embedder or load_embedder(artifact.manifest.embedder.id)
        check_embedder(path, artifact.manifest, chosen)
        router = cls(
            artifact,
            chosen,
            max_batch=max_batch,
            max_wait_ms=max_wait_ms,
            cache_entries=cache_entries,
            queue_max=queue_max,
        )
        router._classify_batch(["The first run allocates; no request should wait for that."])
        return router

    @property
    def embedder(self) -> Embedder:
        """The model that reads the queries; its ``embed`` may be called from any thread."""
        return self._embedder

    @property
    def categories(self) -> tuple[str, ...]:
        return self._artifact.model.categories

    @property
    def artifact_digest(self) -> str:
        return self._artifact.digest

    async def classify(self, text: str) -> Classification:
        """Classify one query; raises QueueFull at the bound, RuntimeError after ``aclose``."""
        routed = routing_text(text, max_chars=self._artifact.manifest.text_max_chars)
        key = hashlib.blake2b(routed.encode(), digest_size=16).digest()
        hit = self._cache.get(key)
        if hit is not None:
            self._cache.move_to_end(key)
            return hit
        shared = self._in_flight.get(key) or self._begin(key, routed)
        return await self._wait(key, shared)

    async def aclose(self) -> None:
        """Refuse new queries, finish the accepted ones and end the worker thread."""
        await self._batcher.aclose()

    def _begin(self, key: bytes, routed: str) -> _Shared:
        shared = _Shared(self._batcher.submit(routed))
        self._in_flight[key] = shared
        shared.future.add_done_callback(partial(self._settle, key, shared))
        return shared

    async def _wait(self, key: bytes, shared: _Shared) -> Classification:
        shared.waiters += 1
        try:
            return await asyncio.shield(shared.future)
        finally:
            shared.waiters -= 1
            if not shared.waiters and not shared.future.done():
                # Forgotten first: a newcomer must begin anew, not join what is being cancelled.
                self._in_flight.pop(key, None)
                shared.future.cancel()

    def _settle(self, key: bytes, shared: _Shared, future: asyncio.Future[Classification]) -> None:
        if self._in_flight.get(key) is shared:
            del self._in_flight[key]
        if future.cancelled() or future.exception() is not None:
            return
        self._cache[key] = replace(future.result(), cached=True)
        while len(self._cache) > self._cache_entries:
            self._cache.popitem(last=False)

    def _classify_batch(self, texts: Sequence[str]) -> list[Classification]:
        vectors, ablated = self._embedded(texts)
        quality = self._artifact.quality
        if quality is None:
            return self._artifact.model.classify(vectors, ablated)
        return classify_with_quality(
            self._artifact.model, quality.model, quality.experts, texts, vectors, ablated
        )

    def _embedded(self, texts: Sequence[str]) -> tuple[Float32Array, Float32Array | None]:
        if isinstance(self._embedder, AblatingEmbedder):
            return self._embedder.embed_ablated(texts)
        return self._embedder.embed(texts), None
