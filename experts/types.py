"""Domain types that every layer shares. Frozen, free of I/O, money in integer micro-dollars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

MICRO_USD_PER_USD = 1_000_000
TOKENS_PER_MTOK = 1_000_000


class Capability(StrEnum):
    """What an expert can do; a request's needs are subsets of these."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"
    TOOLS = "tools"
    PARALLEL_TOOLS = "parallel_tools"  # several calls in one turn
    IMAGES = "images"
    AUDIO = "audio"
    JSON_SCHEMA = "json_schema"
    LOGPROBS = "logprobs"


class SourceKind(StrEnum):
    """Where an expert's answers come from."""

    WEIGHTS = "weights"  # a folder or hub id, run by an expert host
    REMOTE = "remote"  # any OpenAI-compatible URL
    SCRIPTED = "scripted"  # shipped fake: fixed answers, for tests and overhead benchmarks
    BUILTIN = "builtin"  # runs inside the gateway; made by its wiring, never by the file


class Endpoint(StrEnum):
    """OpenAI paths below /v1 that can be forwarded to an expert."""

    CHAT = "chat/completions"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"


@dataclass(frozen=True, slots=True)
class Price:
    """Micro-dollars per million tokens, as integers (0.15 USD per million tokens = 150_000)."""

    input_micro_usd_per_mtok: int = 0
    output_micro_usd_per_mtok: int = 0

    def cost_micro_usd(self, input_tokens: int, output_tokens: int) -> int:
        """Cost of a call, rounded up to a whole micro-dollar so that sums never undercharge."""
        total = (
            input_tokens * self.input_micro_usd_per_mtok
            + output_tokens * self.output_micro_usd_per_mtok
        )
        return -(-total // TOKENS_PER_MTOK)


class Usage(msgspec.Struct, frozen=True):
    """Tokens of one call."""

    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens, self.output_tokens + other.output_tokens
        )


@dataclass(frozen=True, slots=True)
class AnswerParsers:
    """How an expert of our hosts writes tool calls and reasoning, by vLLM's names of parsers.

    None: calls stay text of the answer, unless the request forces one; reasoning always does.
    """

    tool_calls: str | None = None
    reasoning: str | None = None


@dataclass(frozen=True, slots=True)
class ExpertSpec:
    """One expert as the catalogue describes it.

    ``location``: a folder path or hub id (weights), a base URL ending in /v1 (remote), a behaviour
    name (scripted), or the folder of a tokenizer (builtin). ``upstream_model`` is the name a remote
    server knows it by. ``languages``: ISO 639 codes it was made for; empty means any.
    ``secret_env`` names the environment variable that holds a remote's key; the key itself is
    never stored here.
    """

    id: str
    kind: SourceKind
    location: str
    price: Price
    context_tokens: int
    capabilities: frozenset[Capability]
    parameters: int | None = None
    tags: frozenset[str] = frozenset()
    languages: frozenset[str] = frozenset()
    description: str = ""
    upstream_model: str | None = None
    secret_env: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    parsers: AnswerParsers = AnswerParsers()


class Needs(msgspec.Struct, frozen=True):
    """What a request cannot do without; experts that lack any of it are never ranked.

    ``language``: ISO 639 code of the prompt; None where it is neither declared nor recognised.
    """

    capabilities: frozenset[Capability]
    prompt_tokens: int
    output_tokens: int = 0
    required_tags: frozenset[str] = frozenset()
    language: str | None = None
    allow: frozenset[str] | None = None  # None: every expert
    deny: frozenset[str] = frozenset()
