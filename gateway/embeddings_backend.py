"""The router's embedder as an expert: vectors for callers, made inside the gateway."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from experts.errors import ExpertFailed, UpstreamTimeout
from experts.protocol import ExpertCall, ExpertReply, ExpertStream
from experts.types import Capability, ExpertSpec, Price, SourceKind
from gateway.config import EMBEDDER_ID
from routers.batching import MicroBatcher
from routers.embedder import Float32Array, ServableEmbedder

__all__ = ["EmbedderBackend", "embedder_spec"]

_TEXTS_AT_ONCE = 16  # of one request; others get their turn in between
_QUEUE_MAX = 2048


def embedder_spec(embedder: ServableEmbedder, price: Price) -> ExpertSpec:
    """How the embedder stands in the catalogue."""
    return ExpertSpec(
        id=EMBEDDER_ID,
        kind=SourceKind.BUILTIN,
        location=str(embedder.tokenizer_folder),
        price=price,
        context_tokens=embedder.max_tokens,
        capabilities=frozenset({Capability.EMBEDDINGS}),
        description=f"The router's embedder, {embedder.dimensions} dimensions.",
    )


@dataclass(frozen=True, slots=True)
class _Embedded:
    vector: Float32Array
    tokens: int


class EmbedderBackend:
    """A ``Backend`` for embeddings only. Runs on one thread of its own, in micro-batches."""

    def __init__(self, embedder: ServableEmbedder) -> None:
        self._embedder = embedder
        self._batcher: MicroBatcher[str, _Embedded] = MicroBatcher(
            self._embed,
            name="embedder",
            max_batch=_TEXTS_AT_ONCE,
            max_wait_ms=0.0,
            queue_max=_QUEUE_MAX,
        )

    async def complete(self, call: ExpertCall) -> ExpertReply:
        """Raises ExpertFailed for what it cannot do, UpstreamTimeout, QueueFull."""
        texts = _texts(call)
        self._check_dimensions(call)
        found: list[_Embedded] = []
        try:
            async with asyncio.timeout(call.timeout_ms / 1000.0):
                for start in range(0, len(texts), _TEXTS_AT_ONCE):
                    found += await self._some(texts[start : start + _TEXTS_AT_ONCE])
        except TimeoutError as error:
            raise UpstreamTimeout(call.expert, "total", call.timeout_ms) from error
        return ExpertReply(_body(call.body, found))

    def stream(self, call: ExpertCall) -> AbstractAsyncContextManager[ExpertStream]:
        """Raises ExpertFailed: embeddings come whole."""
        raise ExpertFailed(call.expert, 400, "embeddings are not streamed", "stream")

    async def aclose(self) -> None:
        await self._batcher.aclose()

    async def _some(self, texts: Sequence[str]) -> list[_Embedded]:
        futures = [self._batcher.submit(text) for text in texts]
        try:
            return await asyncio.gather(*futures)
        finally:
            for future in futures:
                future.cancel()

    def _embed(self, texts: Sequence[str]) -> list[_Embedded]:
        vectors, counts = self._embedder.embed(texts), self._embedder.token_counts(texts)
        return [_Embedded(row, count) for row, count in zip(vectors, counts, strict=True)]

    def _check_dimensions(self, call: ExpertCall) -> None:
        own = self._embedder.dimensions
        if call.body.get("dimensions") not in (None, own):
            detail = f"its vectors have {own} dimensions and cannot be shortened"
            raise ExpertFailed(call.expert, 400, detail, "dimensions", "invalid_request")


def _texts(call: ExpertCall) -> list[str]:
    given = call.body["input"]
    texts = [given] if isinstance(given, str) else given
    if not all(isinstance(text, str) for text in texts):
        detail = "takes texts, not token ids: ids belong to another tokenizer"
        raise ExpertFailed(call.expert, 400, detail, "input", "invalid_request")
    return list(texts)


def _body(asked: Mapping[str, Any], found: Sequence[_Embedded]) -> dict[str, Any]:
    encode = _base64 if asked.get("encoding_format") == "base64" else _floats
    tokens = sum(one.tokens for one in found)
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(one.vector)}
            for index, one in enumerate(found)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _base64(vector: Float32Array) -> str:
    """Little-endian float32, as OpenAI sends them."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _floats(vector: Float32Array) -> list[float]:
    floats: list[float] = vector.tolist()
    return floats
