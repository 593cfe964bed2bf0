"""Chat answers as OpenAI Responses: the object, and the events that build it. Pure.

The events come in the order of OpenAI's own streams: created, in_progress, then for each output
item added, its parts' deltas and done, at last completed, incomplete or failed. Sequence numbers
count from 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from experts.answer_shape import decode_chunk
from experts.errors import CoeError
from gateway.answer_blocks import Block, BlockKind, BlockSequencer, Closed, Grew, Opened, Step
from gateway.http_errors import error_object, row_for
from gateway.sse import named_event

__all__ = ["ResponsesStream", "response_of"]

_ECHOED = (
    *("instructions", "max_output_tokens", "max_tool_calls", "metadata", "reasoning"),
    *("service_tier", "temperature", "top_logprobs", "top_p", "user", "safety_identifier"),
    *("prompt_cache_key",),
)
_CUT_SHORT = {"length": "max_output_tokens", "content_filter": "content_filter"}
_PREFIX = {BlockKind.REASONING: "rs", BlockKind.TOOL: "fc"}


class ResponsesStream:
    """One answer on its way. ``tag`` makes the ids; ``created_s`` is its wall-clock time.

    ``coe`` objects found in the chunks go into the response object.
    """

    def __init__(self, asked: Mapping[str, Any], *, tag: str, created_s: int) -> None:
        self._asked = asked
        self._tag = tag
        self._created_s = created_s
        self._blocks = BlockSequencer()
        self._number = -1
        self._model: str | None = None
        self._coe: Any = None
        self._usage: Mapping[str, Any] | None = None

    def write(self, payloads: Sequence[bytes]) -> bytes:
        chunks = [decode_chunk(payload) for payload in payloads]
        events = (event for chunk in chunks for event in self.feed(chunk))
        return b"".join(map(self._framed, events))

    def end(self) -> bytes:
        return b"".join(map(self._framed, self.finish()))

    def failed(self, error: CoeError) -> bytes:
        """A failed response; an ``error`` event if no response had begun."""
        fields = error_object(error)["error"]
        if self._model is None:
            event = {"type": "error", **{k: fields[k] for k in ("code", "message", "param")}}
            return self._framed(event)
        shown = "rate_limit_exceeded" if row_for(error).status == 429 else "server_error"
        detail = {"code": shown, "message": fields["message"], "cause": fields["code"]}
        response = self.response("failed") | {"error": detail}
        return self._framed({"type": "response.failed", "response": response})

    def feed(self, chunk: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Events of one chat chunk, without sequence numbers."""
        self._coe = chunk.get("coe", self._coe)
        self._usage = chunk.get("usage") or self._usage
        if self._model is None:
            self._model = str(chunk.get("model", ""))
            for kind in ("created", "in_progress"):
                yield {"type": f"response.{kind}", "response": self.response("in_progress")}
        for choice in (chunk.get("choices") or ())[:1]:
            yield from self._events(self._blocks.feed_choice(choice))

    def finish(self) -> Iterator[dict[str, Any]]:
        """The last events."""
        yield from self._events(self._blocks.finish())
        status = self._final_status()
        yield {"type": f"response.{status}", "response": self.response(status)}

    def response(self, status: str) -> dict[str, Any]:
        """The response object as it stands."""
        asked = self._asked
        running = status == "in_progress"
        reason = _CUT_SHORT.get(self._blocks.finish_reason or "")
        return {
            "id": f"resp_{self._tag}",
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": reason} if status == "incomplete" else None,
            "model": self._model,
            "output": [] if running else [self._item(block) for block in self._blocks.blocks],
            "parallel_tool_calls": asked.get("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "store": False,
            "text": asked.get("text") or {"format": {"type": "text"}},
            "tool_choice": asked.get("tool_choice") or "auto",
            "tools": [{"parameters": None, "strict": None} | t for t in asked.get("tools") or ()],
            "truncation": "disabled",
            "usage": None if running or self._usage is None else _usage(self._usage),
            **{name: asked.get(name) for name in _ECHOED},
            "coe": self._coe,
        }

    def _final_status(self) -> str:
        return "incomplete" if self._blocks.finish_reason in _CUT_SHORT else "completed"

    def _framed(self, event: dict[str, Any]) -> bytes:
        self._number += 1
        return named_event(event["type"], event | {"sequence_number": self._number})

    # --- blocks ----------------------------------------------------------------------------------

    def _events(self, steps: Iterable[Step]) -> Iterator[dict[str, Any]]:
        for step in steps:
            match step:
                case Opened(block):
                    yield from self._opened(block)
                case Grew(block, delta, logprobs):
                    yield self._grew(block, delta, logprobs)
                case Closed(block):
                    yield from self._closed(block)

    def _opened(self, block: Block) -> Iterator[dict[str, Any]]:
        item = self._item(block, status="in_progress")
        if block.kind is not BlockKind.TOOL:
            item["content"] = []
        yield {
            "type": "response.output_item.added",
            "output_index": block.index,
            "item": item,
        }
        if block.kind is not BlockKind.TOOL:
            part = _part(block)
            yield self._of(block, "response.content_part.added", content_index=0, part=part)

    def _grew(self, block: Block, delta: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        match block.kind:
            case BlockKind.TOOL:
                return self._of(block, "response.function_call_arguments.delta", delta=delta)
            case BlockKind.REASONING:
                kind = "response.reasoning_text.delta"
            case BlockKind.REFUSAL:
                kind = "response.refusal.delta"
            case BlockKind.TEXT:
                return self._of(
                    block,
                    "response.output_text.delta",
                    content_index=0,
                    delta=delta,
                    logprobs=_delta_logprobs(logprobs),
                )
        return self._of(block, kind, content_index=0, delta=delta)

    def _closed(self, block: Block) -> Iterator[dict[str, Any]]:
        match block.kind:
            case BlockKind.TOOL:
                kind, fields = "function_call_arguments", {"arguments": block.text}
                fields["name"] = block.name
            case BlockKind.REASONING:
                kind, fields = "reasoning_text", {"text": block.text}
            case BlockKind.REFUSAL:
                kind, fields = "refusal", {"refusal": block.text}
            case BlockKind.TEXT:
                kind, fields = "output_text", {"text": block.text}
        extra: dict[str, Any] = dict(fields)
        if block.kind is BlockKind.TEXT:
            extra["logprobs"] = _delta_logprobs(block.logprobs)
        if block.kind is not BlockKind.TOOL:
            extra["content_index"] = 0
        yield self._of(block, f"response.{kind}.done", **extra)
        if block.kind is not BlockKind.TOOL:
            part = _part(block, block.text)
            yield self._of(block, "response.content_part.done", content_index=0, part=part)
        item = self._item(block)
        yield {"type": "response.output_item.done", "output_index": block.index, "item": item}

    def _of(self, block: Block, kind: str, **fields: Any) -> dict[str, Any]:
        return {
            "type": kind,
            "item_id": self._item_id(block),
            "output_index": block.index,
            **fields,
        }

    def _item(self, block: Block, *, status: str | None = None) -> dict[str, Any]:
        last = block is self._blocks.blocks[-1]
        cut = last and self._blocks.finish_reason in _CUT_SHORT
        status = status or ("incomplete" if cut else "completed")
        item: dict[str, Any] = {"id": self._item_id(block), "status": status}
        match block.kind:
            case BlockKind.TOOL:
                call = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
                return item | {"type": "function_call"} | call
            case BlockKind.REASONING:
                return item | {
                    "type": "reasoning",
                    "summary": [],
                    "content": [_part(block, block.text)],
                }
        content = [_part(block, block.text)]
        return item | {"type": "message", "role": "assistant", "content": content}

    def _item_id(self, block: Block) -> str:
        return f"{_PREFIX.get(block.kind, 'msg')}_{self._tag}_{block.index}"


def response_of(
    body: Mapping[str, Any], asked: Mapping[str, Any], *, tag: str, created_s: int
) -> dict[str, Any]:
    """A whole chat answer as a response object: the end of the stream that it could have been."""
    stream = ResponsesStream(asked, tag=tag, created_s=created_s)
    *_, last = [*stream.feed(body), *stream.finish()]
    response: dict[str, Any] = last["response"]
    return response


def _part(block: Block, text: str = "") -> dict[str, Any]:
    match block.kind:
        case BlockKind.REASONING:
            return {"type": "reasoning_text", "text": text}
        case BlockKind.REFUSAL:
            return {"type": "refusal", "refusal": text}
    logprobs = block.logprobs if text else []
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _delta_logprobs(logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As events carry them: without bytes."""
    return [
        {
            "token": one["token"],
            "logprob": one["logprob"],
            "top_logprobs": [
                {"token": top["token"], "logprob": top["logprob"]}
                for top in one.get("top_logprobs") or ()
            ],
        }
        for one in logprobs
    ]


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    prompt, output = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": output,
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": prompt + output,
    }
