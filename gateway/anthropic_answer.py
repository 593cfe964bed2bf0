"""Chat answers as Anthropic messages: the object, and the events that build it. Pure.

The events come in Anthropic's order: message_start, then for each block start, deltas and stop, at
last message_delta and message_stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from experts.answer_shape import decode_chunk
from experts.errors import CoeError
from gateway.answer_blocks import Block, BlockKind, BlockSequencer, Closed, Grew, Opened, Step
from gateway.anthropic_errors import anthropic_error
from gateway.sse import named_event

__all__ = ["MessageStream", "message_of"]

_STOP_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}
UNPARSED = "_unparsed_arguments"


class MessageStream:
    """One answer on its way.

    ``prompt_tokens`` is asked at the start, when only an estimate is known. ``thinking`` False
    leaves the expert's reasoning out, as Anthropic does when it is not asked for.
    """

    def __init__(
        self,
        *,
        message_id: str,
        request_id: str,
        prompt_tokens: Callable[[], int],
        thinking: bool,
    ) -> None:
        self._message_id = message_id
        self._request_id = request_id
        self._prompt_tokens = prompt_tokens
        self._thinking = thinking
        self._blocks = BlockSequencer()
        self._indexes: dict[int, int] = {}
        self._model: str | None = None
        self._coe: Any = None
        self._usage: Mapping[str, Any] | None = None

    def write(self, payloads: Sequence[bytes]) -> bytes:
        chunks = [decode_chunk(payload) for payload in payloads]
        events = (event for chunk in chunks for event in self.feed(chunk))
        return b"".join(_framed(event) for event in events)

    def end(self) -> bytes:
        return b"".join(_framed(event) for event in self.finish())

    def failed(self, error: CoeError) -> bytes:
        return _framed(anthropic_error(error, self._request_id))

    def feed(self, chunk: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Events of one chat chunk."""
        self._coe = chunk.get("coe", self._coe)
        self._usage = chunk.get("usage") or self._usage
        if self._model is None:
            self._model = str(chunk.get("model", ""))
            start = self._message() | {"usage": self._first_usage()}
            yield {"type": "message_start", "message": start}
        for choice in (chunk.get("choices") or ())[:1]:
            yield from self._events(self._blocks.feed_choice(choice))

    def finish(self) -> Iterator[dict[str, Any]]:
        """The last events."""
        yield from self._events(self._blocks.finish())
        yield {
            "type": "message_delta",
            "delta": self._ending(),
            "usage": self._final_usage(),
            "coe": self._coe,
        }
        yield {"type": "message_stop"}

    def message(self) -> dict[str, Any]:
        """The whole message, once finished."""
        content = [_content(block) for block in self._blocks.blocks if self._is_shown(block)]
        ending = {"content": content, **self._ending(), "usage": self._final_usage()}
        return self._message() | ending | {"coe": self._coe}

    def _message(self) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": {},
            "coe": self._coe,
        }

    def _ending(self) -> dict[str, Any]:
        blocks = self._blocks
        reason = _STOP_REASONS.get(blocks.finish_reason or "stop", "end_turn")
        kinds = {block.kind for block in blocks.blocks}
        if reason == "end_turn" and BlockKind.TOOL in kinds:
            reason = "tool_use"  # a call that was forced by name ends with "stop" at OpenAI
        if reason == "end_turn" and blocks.stop_sequence is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": blocks.stop_sequence}
        if BlockKind.REFUSAL in kinds:
            reason = "refusal"
        return {"stop_reason": reason, "stop_sequence": None}

    def _first_usage(self) -> dict[str, int]:
        return {"input_tokens": self._prompt_tokens(), "output_tokens": 0}

    def _final_usage(self) -> dict[str, int]:
        usage = self._usage or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        prompt = usage.get("prompt_tokens") or self._prompt_tokens()
        return {
            "input_tokens": max(0, prompt - cached),
            "output_tokens": usage.get("completion_tokens") or 0,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
        }

    # --- blocks ----------------------------------------------------------------------------------

    def _is_shown(self, block: Block) -> bool:
        return self._thinking or block.kind is not BlockKind.REASONING

    def _events(self, steps: Iterable[Step]) -> Iterator[dict[str, Any]]:
        for step in steps:
            if not self._is_shown(step.block):
                continue
            index = self._indexes.setdefault(step.block.index, len(self._indexes))
            match step:
                case Opened(block):
                    yield {
                        "type": "content_block_start",
                        "index": index,
                        "content_block": _empty(block),
                    }
                case Grew(block, delta):
                    yield {
                        "type": "content_block_delta",
                        "index": index,
                        "delta": _delta(block, delta),
                    }
                case Closed():
                    yield {"type": "content_block_stop", "index": index}


def message_of(
    body: Mapping[str, Any], *, message_id: str, prompt_tokens: int, thinking: bool
) -> dict[str, Any]:
    """A whole chat answer as a message: the end of the stream that it could have been."""
    stream = MessageStream(
        message_id=message_id, request_id="", prompt_tokens=lambda: prompt_tokens, thinking=thinking
    )
    for _ in (*stream.feed(body), *stream.finish()):
        pass
    return stream.message()


def _empty(block: Block) -> dict[str, Any]:
    match block.kind:
        case BlockKind.TOOL:
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}
        case BlockKind.REASONING:
            return {"type": "thinking", "thinking": "", "signature": ""}
    return {"type": "text", "text": ""}


def _delta(block: Block, delta: str) -> dict[str, Any]:
    match block.kind:
        case BlockKind.TOOL:
            return {"type": "input_json_delta", "partial_json": delta}
        case BlockKind.REASONING:
            return {"type": "thinking_delta", "thinking": delta}
    return {"type": "text_delta", "text": delta}


def _content(block: Block) -> dict[str, Any]:
    whole = _empty(block)
    match block.kind:
        case BlockKind.TOOL:
            return whole | {"input": _input(block.text)}
        case BlockKind.REASONING:
            return whole | {"thinking": block.text}
    return whole | {"text": block.text}


def _input(arguments: str) -> dict[str, Any]:
    """Arguments as the object that Anthropic has; what is none, cut short say, is kept as text."""
    try:
        decoded = msgspec.json.decode(arguments or "{}")
    except msgspec.DecodeError:
        return {UNPARSED: arguments}
    return decoded if isinstance(decoded, dict) else {UNPARSED: arguments}


def _framed(event: dict[str, Any]) -> bytes:
    return named_event(event["type"], event)
