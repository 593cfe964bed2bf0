"""A chat answer as a sequence of blocks, one after the other: what other APIs make of it.

Chat completions may interleave the pieces of an answer in any way; the Responses and the Messages
API send one block at a time. ``BlockSequencer`` turns the one into the other without losing or
reordering anything within a block. A whole answer is a stream of one chunk, so that whole and
streamed answers cannot differ. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import msgspec

__all__ = ["Block", "BlockKind", "BlockSequencer", "Closed", "Grew", "Opened", "Step"]


class BlockKind(StrEnum):
    REASONING = "reasoning"
    TEXT = "text"
    REFUSAL = "refusal"
    TOOL = "tool"


@dataclass(slots=True)
class Block:
    """``parts`` joined are the block's text, or a tool call's arguments."""

    index: int
    kind: BlockKind
    call_id: str = ""
    name: str = ""
    parts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


@dataclass(frozen=True, slots=True)
class Opened:
    block: Block


@dataclass(frozen=True, slots=True)
class Grew:
    block: Block
    delta: str
    logprobs: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Closed:
    block: Block


Step = Opened | Grew | Closed


@dataclass(slots=True)
class _Waiting:
    """A block behind an open tool call."""

    key: tuple[BlockKind, int]
    call_id: str = ""
    name: str = ""
    pieces: list[tuple[str, list[dict[str, Any]]]] = field(default_factory=list)


class BlockSequencer:
    """Feed chat messages or deltas of one choice; get the steps of its blocks.

    The choices are of the shape that ``experts.answer_shape`` checks.

    Text, reasoning and refusals end when something else begins. A tool call stays open until the
    answer ends, because more of its arguments may come at any time; what follows it waits and is
    sent when the answer ends.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.finish_reason: str | None = None
        self.stop_sequence: str | None = None
        self._open: Block | None = None
        self._open_key: tuple[BlockKind, int] | None = None
        self._waiting: list[_Waiting] = []

    def feed_choice(self, choice: Mapping[str, Any]) -> Iterator[Step]:
        """Steps of one choice of a chunk (``delta``) or of a whole answer (``message``)."""
        delta = choice.get("delta") or choice.get("message") or {}
        is_whole = not choice.get("delta")
        tokens = (choice.get("logprobs") or {}).get("content") or []
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        yield from self._feed(BlockKind.REASONING, 0, reasoning, [])
        yield from self._feed(BlockKind.TEXT, 0, delta.get("content"), tokens)
        yield from self._feed(BlockKind.REFUSAL, 0, delta.get("refusal"), [])
        for position, call in enumerate(delta.get("tool_calls") or ()):
            # In a whole answer a call is what stands there; some servers number all of them 0.
            yield from self._feed_call(call, position if is_whole else call.get("index", position))
        if (reason := choice.get("finish_reason")) is not None:
            self.finish_reason = reason
            stop = choice.get("stop_reason")
            self.stop_sequence = stop if isinstance(stop, str) else None

    def finish(self) -> Iterator[Step]:
        """Close what is open and send what waited."""
        yield from self._close()
        waiting, self._waiting = self._waiting, []
        for one in waiting:
            yield from self._begin(one.key, one.call_id, one.name)
            for piece, logprobs in one.pieces:
                yield from self._grow(piece, logprobs)
            yield from self._close()

    def _feed_call(self, call: Mapping[str, Any], index: int) -> Iterator[Step]:
        function = call.get("function") or {}
        key = (BlockKind.TOOL, index)
        call_id, name = call.get("id") or "", function.get("name") or ""
        arguments = function.get("arguments") or ""
        if not isinstance(arguments, str):  # some servers send the object itself
            arguments = msgspec.json.encode(arguments).decode()
        if self._open_key == key:
            yield from self._grow(arguments, [])
        elif name and not self._must_wait(key):
            yield from self._close()
            yield from self._begin(key, call_id, name)
            yield from self._grow(arguments, [])
        else:
            waiting = self._behind(key)
            waiting.call_id, waiting.name = waiting.call_id or call_id, waiting.name or name
            waiting.pieces.append((arguments, []))

    def _feed(
        self, kind: BlockKind, index: int, text: Any, logprobs: list[dict[str, Any]]
    ) -> Iterator[Step]:
        if not isinstance(text, str) or not text:
            return
        key = (kind, index)
        if self._open_key == key:
            yield from self._grow(text, logprobs)
        elif self._must_wait(key):
            self._behind(key).pieces.append((text, logprobs))
        else:
            yield from self._close()
            yield from self._begin(key)
            yield from self._grow(text, logprobs)

    def _must_wait(self, key: tuple[BlockKind, int]) -> bool:
        tool_is_open = self._open is not None and self._open.kind is BlockKind.TOOL
        return tool_is_open or any(one.key == key for one in self._waiting)

    def _behind(self, key: tuple[BlockKind, int]) -> _Waiting:
        """The waiting block of ``key``; text after something else that waits is a new block."""
        for one in reversed(self._waiting):
            if one.key == key:
                return one
            if key[0] is not BlockKind.TOOL:
                break
        self._waiting.append(_Waiting(key))
        return self._waiting[-1]

    def _begin(
        self, key: tuple[BlockKind, int], call_id: str = "", name: str = ""
    ) -> Iterator[Step]:
        block = Block(len(self.blocks), key[0], call_id, name)
        self.blocks.append(block)
        self._open, self._open_key = block, key
        yield Opened(block)

    def _grow(self, piece: str, logprobs: list[dict[str, Any]]) -> Iterator[Step]:
        if self._open is not None and piece:
            self._open.parts.append(piece)
            self._open.logprobs.extend(logprobs)
            yield Grew(self._open, piece, logprobs)

    def _close(self) -> Iterator[Step]:
        block, self._open, self._open_key = self._open, None, None
        if block is not None:
            yield Closed(block)
