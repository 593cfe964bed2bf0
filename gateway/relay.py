"""Passing a stream's chunks on: untouched where possible, rewritten where they would be wrong.

Pure. A chunk is decoded only if it is the first or the last, carries usage, names another model
than the expert, or holds log-probabilities that the caller did not ask for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from experts.answer_shape import OddAnswer, decode_chunk
from experts.types import Usage
from gateway.fields import is_int

__all__ = ["ChunkRelay", "strip_logprobs", "usage_in", "usage_of"]

_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')


class ChunkRelay:
    """The payloads of one expert's stream in, the caller's payloads out.

    The chunk that finishes the answer is kept back until the next event or the end, so that the
    last chunk the caller sees can carry ``coe``; a stream that ends otherwise gets one more.
    Upstream is always asked for usage; the usage chunk goes on only if the caller wants it.
    """

    def __init__(
        self, *, expert: str, rename: bool, hide_logprobs: bool, include_usage: bool
    ) -> None:
        self._expert = expert
        self._hide_logprobs = hide_logprobs
        self._include_usage = include_usage
        self._rewrite_all = rename or hide_logprobs
        self._kept: bytes | None = None
        self._kept_chunk: dict[str, Any] = {}
        self._usage_chunk: dict[str, Any] | None = None
        self._head: dict[str, Any] | None = None
        self.usage: Usage | None = None
        self.chunks = 0

    def feed(self, payloads: Iterable[bytes], coe: Mapping[str, Any] | None) -> list[bytes]:
        """Payloads to send now. ``coe`` goes into the stream's first chunk.

        Raises:
            OddAnswer: a chunk that had to be decoded is not what it should be.
        """
        out: list[bytes] = []
        for payload in payloads:
            if b'"usage"' in payload and _USAGE.search(payload) and self._take_usage(payload):
                continue
            self.chunks += 1
            if self._head is None:
                payload = self._first(payload, coe)
            elif self._rewrite_all:
                payload = msgspec.json.encode(self._corrected(decode_chunk(payload)))
            if self._kept is not None:
                out.append(self._kept)
                self._kept = None
            if _FINISHED.search(payload):
                # Decoded now and not at the end, when the expert has been thanked already.
                self._kept, self._kept_chunk = payload, decode_chunk(payload)
            else:
                out.append(payload)
        return out

    def finish(self, usage: Usage, coe: Mapping[str, Any]) -> list[bytes]:
        """The last payloads: the kept one, and the usage chunk if it was asked for."""
        if not self._include_usage:
            chunk = self._closing() if self._kept is None else self._kept_chunk
            return [msgspec.json.encode(chunk | {"coe": coe})]
        last = [] if self._kept is None else [self._kept]
        chunk = self._usage_chunk or (self._head or {}) | {"choices": []}
        counts = chunk.get("usage") or _usage_object(usage)
        body = self._corrected(chunk) | {"usage": counts, "coe": coe}
        return [*last, msgspec.json.encode(body)]

    def _closing(self) -> dict[str, Any]:
        """A chunk that adds nothing to the answer, with a choice, since clients look for one."""
        head = self._head or _head_of(self._usage_chunk or {})
        is_text = head.get("object") == "text_completion"
        said: dict[str, Any] = {"text": ""} if is_text else {"delta": {}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": None}
        return self._corrected(head | {"choices": [choice]})

    def _take_usage(self, payload: bytes) -> bool:
        """Note the usage; True when the chunk carried nothing else."""
        chunk = decode_chunk(payload)
        self.usage = usage_of(chunk) or self.usage
        if chunk.get("choices"):
            return False
        self._usage_chunk = chunk
        return True

    def _first(self, payload: bytes, coe: Mapping[str, Any] | None) -> bytes:
        chunk = self._corrected(decode_chunk(payload))
        self._head = _head_of(chunk)
        # Servers that ignore our view of the model's name are found out by their first chunk.
        return msgspec.json.encode(chunk | {"coe": coe} if coe is not None else chunk)

    def _corrected(self, chunk: dict[str, Any]) -> dict[str, Any]:
        if chunk.get("model") != self._expert:
            chunk["model"] = self._expert
            self._rewrite_all = True
        if self._hide_logprobs:
            strip_logprobs(chunk)
        return chunk


def _head_of(chunk: Mapping[str, Any]) -> dict[str, Any]:
    """What all chunks of a stream have in common."""
    return {k: chunk[k] for k in ("id", "object", "created", "model") if k in chunk}


def strip_logprobs(body: dict[str, Any]) -> None:
    """Take out log-probabilities, as if they had not been asked for."""
    for choice in body.get("choices") or ():
        if "logprobs" in choice:
            choice["logprobs"] = None


def usage_of(body: Mapping[str, Any]) -> Usage | None:
    """The ``usage`` of a body or chunk; None when absent or not in OpenAI's shape.

    Counts below zero are in nobody's shape: they would give a key money back.
    """
    usage = body.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, output = usage.get("prompt_tokens"), usage.get("completion_tokens", 0)
    if not (is_int(prompt) and is_int(output)) or prompt < 0 or output < 0:
        return None
    return Usage(prompt, output)


def usage_in(payloads: Sequence[bytes]) -> Usage | None:
    """The last usage that any of these chunks carries; one that cannot be read carries none."""
    for payload in reversed(payloads):
        if not _USAGE.search(payload):
            continue
        with suppress(OddAnswer):
            if usage := usage_of(decode_chunk(payload)):
                return usage
    return None


def _usage_object(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
