"""Embeddings of a scripted expert: unit vectors made from the inputs' digests."""

from __future__ import annotations

import base64
import hashlib
import math
import struct
from collections.abc import Mapping
from typing import Any

__all__ = ["render_embeddings"]

_DIMENSIONS_DEFAULT = 8


def render_embeddings(body: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A whole OpenAI embeddings body: equal inputs get equal vectors, usage counts words."""
    given = body["input"]
    one = isinstance(given, str) or (bool(given) and isinstance(given[0], int))
    inputs = [given] if one else given
    size = body.get("dimensions") or _DIMENSIONS_DEFAULT
    as_base64 = body.get("encoding_format") == "base64"
    tokens = sum(len(text.split()) if isinstance(text, str) else len(text) for text in inputs)
    return {
        "object": "list",
        "model": model,
        "data": [
            {"object": "embedding", "index": index, "embedding": _packed(vector, as_base64)}
            for index, vector in enumerate(_vector(repr(text), size) for text in inputs)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _vector(text: str, size: int) -> list[float]:
    raw = hashlib.shake_256(text.encode()).digest(size)
    numbers = [byte - 127.5 for byte in raw]
    length = math.sqrt(sum(number * number for number in numbers))
    return [number / length for number in numbers]


def _packed(vector: list[float], as_base64: bool) -> list[float] | str:
    if not as_base64:
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
