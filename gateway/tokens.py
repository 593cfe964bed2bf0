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
_TOKENS_PER_PROMPT = 32  # what a template adds: a system prompt, the answer's first marker
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
    """Counts prompts for the experts that are asked about."""

    async def count(
        self,
        specs: Sequence[ExpertSpec],
        texts: Sequence[str],
        *,
        messages: int,
        ids: int,
        output_tokens: int,
        exact: bool = False,
    ) -> int:
        """Prompt tokens for the hungriest tokenizer among ``specs``.

        The estimate is good enough whenever even one token per byte would fit every context,
        unless ``exact`` is asked for.
        """
        estimate = estimate_tokens(texts, messages=messages, ids=ids)
        ceiling = _ceiling(texts, messages, ids)
        if not exact and ceiling + output_tokens <= _context_min(specs):
            return min(estimate, ceiling)
        paths = _tokenizer_files(specs)
        if not paths:
            return estimate
        counted = await asyncio.to_thread(_count_max, paths, tuple(texts))
        return counted + ids + _TOKENS_PER_PROMPT + _TOKENS_PER_MESSAGE * messages

    async def count_each(
        self, specs: Sequence[ExpertSpec], texts: Sequence[str]
    ) -> tuple[int, int]:
        """Tokens of all texts together and of the longest: each is a prompt of its own.

        As ``count``, exact only where an estimate could not tell whether the longest fits.
        """
        ceilings = [_ceiling((text,), 0, 0) for text in texts]
        paths = _tokenizer_files(specs)
        if max(ceilings, default=0) <= _context_min(specs) or not paths:
            sizes = [min(c, estimate_tokens((t,))) for c, t in zip(ceilings, texts, strict=True)]
        else:
            sizes = await asyncio.to_thread(_count_singly, paths, tuple(texts))
        return sum(sizes), max(sizes, default=0)


def _context_min(specs: Sequence[ExpertSpec]) -> int:
    return min((spec.context_tokens for spec in specs), default=0)


def _ceiling(texts: Iterable[str], messages: int, ids: int) -> int:
    text_bytes = sum(len(t) if t.isascii() else _utf8_bytes(t) for t in texts)
    frame = _TOKENS_PER_PROMPT + _TOKENS_PER_MESSAGE * messages
    return text_bytes // _BYTES_PER_TOKEN_MIN + ids + frame


def _tokenizer_files(specs: Iterable[ExpertSpec]) -> tuple[str, ...]:
    """Tokenizer files of the experts, each content once: fine-tunes share their base's."""
    by_digest: dict[str, str] = {}
    for spec in specs:
        local = spec.kind in (SourceKind.WEIGHTS, SourceKind.BUILTIN)
        if local and (digest := _digest(spec.location)):
            by_digest.setdefault(digest, spec.location)
    return tuple(by_digest.values())[:_TOKENIZERS_MAX]


@lru_cache(maxsize=4096)
def _digest(folder: str) -> str | None:
    path = Path(folder, "tokenizer.json")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


@lru_cache(maxsize=_TOKENIZERS_MAX)
def _tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    tokenizer.no_truncation()  # some files carry one; it would hide what does not fit
    tokenizer.no_padding()
    return tokenizer


def _count_singly(folders: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Tokens of each text, the tokenizer's own first and last ones included."""
    tokenizers = [_tokenizer(folder) for folder in folders]
    return [max(len(t.encode(text).ids) for t in tokenizers) for text in texts]


def _count_max(folders: Sequence[str], texts: Sequence[str]) -> int:
    return max(
        sum(len(_tokenizer(folder).encode(t, add_special_tokens=False).ids) for t in texts)
        for folder in folders
    )
