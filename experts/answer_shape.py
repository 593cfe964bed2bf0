"""The shape an upstream's answer must have where we read it. Pure.

Whatever is not named here passes unread. Null stands for "absent" everywhere, because servers
differ in which fields they leave out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

__all__ = ["OddAnswer", "check_answer", "decode_chunk"]

_Number = Annotated[float, msgspec.Meta(ge=-1e300, le=1e300)]  # what sums of floats can hold
_Tokens = Annotated[float, msgspec.Meta(ge=0, le=2**31)]


class OddAnswer(ValueError):
    """The text names the field, by its path, and never its value."""


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None  # an object at servers that do not encode it


class _ToolCall(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Message(msgspec.Struct):
    """A whole message or a delta."""

    tool_calls: list[_ToolCall] | None = None


class _TopToken(msgspec.Struct):
    token: str
    logprob: _Number | None


class _Token(msgspec.Struct):
    token: str
    logprob: _Number | None
    top_logprobs: list[_TopToken] | None = None


class _Logprobs(msgspec.Struct):
    """``content`` of chats, ``token_logprobs`` of completions."""

    content: list[_Token] | None = None
    token_logprobs: list[_Number | None] | None = None


class _Choice(msgspec.Struct):
    index: int | None = None
    delta: _Message | None = None
    message: _Message | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: _Tokens | None = None


class _OutputDetails(msgspec.Struct):
    reasoning_tokens: _Tokens | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: _Tokens | None = None
    completion_tokens: _Tokens | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _OutputDetails | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None


def check_answer(body: Mapping[str, Any]) -> None:
    """Check a whole reply or one chunk of a stream, of any endpoint.

    Raises:
        OddAnswer: a field that we read is of another type than OpenAI's.
    """
    try:
        msgspec.convert(body, _Answer)
    except (msgspec.ValidationError, OverflowError) as error:
        raise OddAnswer(f"an answer of another shape: {error}") from error


def decode_chunk(payload: bytes) -> dict[str, Any]:
    """The checked object in one event of a stream.

    Raises:
        OddAnswer: it is no JSON object, or not of the shape we read.
    """
    try:
        chunk = msgspec.json.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OddAnswer("a chunk that is not JSON") from error
    if not isinstance(chunk, dict):
        raise OddAnswer("a chunk that is no JSON object")
    check_answer(chunk)
    return chunk
