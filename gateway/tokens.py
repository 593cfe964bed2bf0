"""How many tokens a prompt has: cheap and high where it cannot matter, exact where it can.

``estimate_tokens`` is an upper-ish estimate from the text's length. Only when a prompt could come
near an expert's context is it counted, with the tokenizers that lie in the experts' folders, off
the event loop. Experts without a local tokenizer keep the estimate.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from experts.types import ExpertSpec, SourceKind

__all__ = ["PromptCounter", "estimate_tokens"]

_CHARS_PER_TOKEN = 3  # English runs at about 4.2, code at about 3
_TOKENS_PER_EXTRA_BYTE = 0.75  # CJK: three bytes, so two extra, at up to 1.5 tokens
_TOKENS_PER_MESSAGE = 8  # role and separators of the chat template
_TOKENS_PER_PROMPT = 16  # opening of the template and the answer's first marker
_BYTES_PER_TOKEN_MIN = 1  # byte-fallback tokenizers never make more tokens than bytes
_TOKENIZERS_MAX = 16


def estimate_tokens(texts: Iterable[str], *, messages: int = 0, ids: int = 0) -> int:
    """An estimate that errs high for prose and code in the languages that were tried."""
    total = float(ids + _TOKENS_PER_PROMPT + _TOKENS_PER_MESSAGE * messages)
    for text in texts:
        total += len(text) / _CHARS_PER_TOKEN
        if not text.isascii():
            total += (_utf8_bytes(text) - len(text)) * _TOKENS_PER_EXTRA_BYTE
    return int(total) + 1


def _utf8_bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


class PromptCounter:
    """Counts prompts for a fixed set of experts."""

    def __init__(self, specs: Sequence[ExpertSpec]) -> None:
        self._context_min = min((spec.context_tokens for spec in specs), default=0)

    async def count(
        self,
        specs: Sequence[ExpertSpec],
        texts: Sequence[str],
        *,
        messages: int,
        ids: int,
        output_tokens: int,
    ) -> int:
        """Prompt tokens for the hungriest tokenizer among ``specs``.

        The estimate is good enough whenever even one token per byte would fit every context.
        """
        estimate = estimate_tokens(texts, messages=messages, ids=ids)
        ceiling = _ceiling(texts, messages, ids)
        if ceiling + output_tokens <= self._context_min:
            return min(estimate, ceiling)
        paths = _tokenizer_files(specs)
        if not paths:
            return estimate
        exact = await asyncio.to_thread(_count_max, paths, tuple(texts))
        return exact + ids + _TOKENS_PER_PROMPT + _TOKENS_PER_MESSAGE * messages


def _ceiling(texts: Iterable[str], messages: int, ids: int) -> int:
    text_bytes = sum(len(t) if t.isascii() else _utf8_bytes(t) for t in texts)
    frame = _TOKENS_PER_PROMPT + _TOKENS_PER_MESSAGE * messages
    return text_bytes // _BYTES_PER_TOKEN_MIN + ids + frame


def _tokenizer_files(specs: Iterable[ExpertSpec]) -> tuple[str, ...]:
    """Tokenizer files of the experts, each content once: fine-tunes share their base's."""
    by_digest: dict[str, str] = {}
    for spec in specs:
        if spec.kind is SourceKind.WEIGHTS and (digest := _digest(spec.location)):
            by_digest.setdefault(digest, spec.location)
    return tuple(by_digest.values())[:_TOKENIZERS_MAX]


@lru_cache(maxsize=4096)
def _digest(folder: str) -> str | None:
    path = Path(folder, "tokenizer.json")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


@lru_cache(maxsize=_TOKENIZERS_MAX)
def _tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(Path(folder, "tokenizer.json")))


def _count_max(folders: Sequence[str], texts: Sequence[str]) -> int:
    return max(
        sum(len(_tokenizer(folder).encode(t, add_special_tokens=False).ids) for t in texts)
        for folder in folders
    )
