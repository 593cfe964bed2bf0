"""Anthropic Messages requests as chat completions. Pure.

Texts, images, tools, tool calls and their results keep their order and their bytes. Thinking blocks
of earlier turns are left out: chat completions have no place for them. Tools and documents that
only Anthropic's servers can handle are refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from experts.errors import InvalidRequest

__all__ = ["chat_body", "wants_thinking"]

# Read here, or hints of Anthropic's own servers; everything else goes to the expert as it is.
_CONSUMED = frozenset(
    {
        *("messages", "system", "tools", "tool_choice", "stop_sequences", "metadata", "thinking"),
        *("output_config", "output_format", "service_tier", "betas", "stream_options"),
        *("cache_control", "inference_geo"),
    }
)
_REFUSED = ("container", "mcp_servers", "context_management")
_THOUGHTS = frozenset({"thinking", "redacted_thinking"})
_EFFORTS = {"low": "low", "medium": "medium", "high": "high", "max": "high"}


def chat_body(asked: Mapping[str, Any], *, counting: bool = False) -> dict[str, Any]:
    """The chat request that means the same. ``counting``: ``max_tokens`` may be missing.

    Raises:
        InvalidRequest: a field has the wrong shape, or asks for what only Anthropic's servers do.
    """
    for name in _REFUSED:
        if asked.get(name):
            raise InvalidRequest(name, "only Anthropic's own servers can do this")
    if asked.get("n") not in (None, 1):
        raise InvalidRequest("n", "a message is one answer")
    if not counting and asked.get("max_tokens") is None:
        raise InvalidRequest("max_tokens", "an integer of at least 1 is required")
    body = {key: value for key, value in asked.items() if key not in _CONSUMED}
    body["messages"] = [*_system(asked.get("system")), *_messages(asked.get("messages"))]
    if body["messages"][-1]["role"] == "assistant":
        # The caller began the answer. vLLM's names for it; other servers refuse them out loud.
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    _add_tools(body, asked)
    _add_options(body, asked)
    if asked.get("stream"):
        body["stream_options"] = {"include_usage": True}
    return body


def wants_thinking(asked: Mapping[str, Any]) -> bool:
    """Whether the caller asked to see the model's reasoning."""
    thinking = asked.get("thinking")
    return isinstance(thinking, dict) and thinking.get("type") in ("enabled", "adaptive")


def _system(given: Any) -> list[dict[str, Any]]:
    if given is None or given == "" or given == []:
        return []
    if isinstance(given, str):
        return [{"role": "system", "content": given}]
    texts = [_text(block, at) for block, at in _blocks(given, "system")]
    return [{"role": "system", "content": "\n\n".join(texts)}]


# --- messages ------------------------------------------------------------------------------------


def _messages(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise InvalidRequest("messages", "a list with at least one message is required")
    messages: list[dict[str, Any]] = []
    for index, message in enumerate(given):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise InvalidRequest(where, "an object is required")
        content = message.get("content")
        match message.get("role"):
            case "user" | "assistant" | "system" as role if isinstance(content, str):
                messages.append({"role": role, "content": content})
            case "user":
                messages.extend(_user_turn(content, f"{where}.content"))
            case "assistant":
                messages.append(_assistant_turn(content, f"{where}.content"))
            case "system":
                messages.extend(_system(content))
            case _:
                raise InvalidRequest(f"{where}.role", "expected user or assistant")
    if not messages:
        raise InvalidRequest("messages", "at least one message with content is required")
    return messages


def _user_turn(content: Any, where: str) -> Iterator[dict[str, Any]]:
    """Tool results first, as messages of their own; then what the user said and showed.

    Pictures in a tool result go to the user's turn, since a tool message holds text alone.
    """
    parts: list[dict[str, Any]] = []
    for block, at in _blocks(content, where):
        if block.get("type") == "tool_result":
            text, pictures = _tool_result(block, at)
            yield {
                "role": "tool",
                "tool_call_id": _string(block, "tool_use_id", at),
                "content": text,
            }
            parts.extend(pictures)
        else:
            parts.append(_part(block, at))
    if len(parts) == 1 and parts[0]["type"] == "text":
        yield {"role": "user", "content": parts[0]["text"]}
    elif parts:
        yield {"role": "user", "content": parts}


def _tool_result(block: Mapping[str, Any], where: str) -> tuple[str, list[dict[str, Any]]]:
    content = block.get("content")
    if content is None:
        content = ""
    parts: list[dict[str, Any]] = []
    if not isinstance(content, str):
        parts = [_part(inner, at) for inner, at in _blocks(content, f"{where}.content")]
        content = "".join(part["text"] for part in parts if part["type"] == "text")
    if block.get("is_error"):
        content = f"Error: {content}"  # a tool message has no other place to say so
    return content, [part for part in parts if part["type"] != "text"]


def _part(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    match block.get("type"):
        case "text":
            return {"type": "text", "text": _text(block, where)}
        case "image":
            return {"type": "image_url", "image_url": {"url": _image_url(block, where)}}
        case "document" if _source(block, where).get("type") == "text":
            return {"type": "text", "text": _string(_source(block, where), "data", where)}
        case kind:
            raise InvalidRequest(f"{where}.type", f"blocks of type {kind!r} are not supported")


def _image_url(block: Mapping[str, Any], where: str) -> str:
    source = _source(block, where)
    match source.get("type"):
        case "url":
            return _string(source, "url", where)
        case "base64":
            kind, data = (_string(source, name, where) for name in ("media_type", "data"))
            return f"data:{kind};base64,{data}"
        case kind:
            raise InvalidRequest(f"{where}.source.type", f"{kind!r} is not supported")


def _source(block: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    source = block.get("source")
    if not isinstance(source, dict):
        raise InvalidRequest(f"{where}.source", "an object is required")
    return source


def _assistant_turn(content: Any, where: str) -> dict[str, Any]:
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block, at in _blocks(content, where):
        kind = block.get("type")
        if kind == "text":
            texts.append(_text(block, at))
        elif kind == "tool_use":
            calls.append(_call(block, at))
        elif not isinstance(kind, str) or kind not in _THOUGHTS:
            raise InvalidRequest(f"{at}.type", f"blocks of type {kind!r} are not supported")
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts) or None}
    if calls:
        return message | {"tool_calls": calls}
    return message | {"content": "".join(texts)}


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = block.get("input")
    if not isinstance(given, dict):
        raise InvalidRequest(f"{where}.input", "an object is required")
    arguments = msgspec.json.encode(given).decode()
    function = {"name": _string(block, "name", where), "arguments": arguments}
    return {"id": _string(block, "id", where), "type": "function", "function": function}


# --- tools and options ---------------------------------------------------------------------------


def _add_tools(body: dict[str, Any], asked: Mapping[str, Any]) -> None:
    tools = asked.get("tools")
    if tools:
        body["tools"] = [_tool(tool, at) for tool, at in _blocks(tools, "tools")]
    choice = asked.get("tool_choice")
    if choice is None:
        return
    if not isinstance(choice, dict):
        raise InvalidRequest("tool_choice", "an object is required")
    match choice.get("type"):
        case "auto" | "none" as kind:
            body["tool_choice"] = kind
        case "any":
            body["tool_choice"] = "required"
        case "tool":
            name = _string(choice, "name", "tool_choice")
            body["tool_choice"] = {"type": "function", "function": {"name": name}}
        case _:
            raise InvalidRequest("tool_choice.type", "expected auto, any, tool or none")
    if choice.get("disable_parallel_tool_use"):
        body["parallel_tool_calls"] = False


def _tool(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") not in (None, "custom"):
        raise InvalidRequest(
            f"{where}.type", f"{tool['type']!r} exists on Anthropic's servers only"
        )
    schema = tool.get("input_schema")
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{where}.input_schema", "an object is required")
    function: dict[str, Any] = {"name": _string(tool, "name", where), "parameters": schema}
    for name in ("description", "strict"):
        if tool.get(name) is not None:
            function[name] = tool[name]
    return {"type": "function", "function": function}


def _add_options(body: dict[str, Any], asked: Mapping[str, Any]) -> None:
    if stops := asked.get("stop_sequences"):
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise InvalidRequest("stop_sequences", "a list of strings is required")
        body["stop"] = stops
    metadata = asked.get("metadata")
    if isinstance(metadata, dict) and metadata.get("user_id") is not None:
        body["user"] = metadata["user_id"]
    output = asked.get("output_config")
    output = output if isinstance(output, dict) else {}
    if output.get("effort") is not None:
        body["reasoning_effort"] = _effort(output["effort"])
    wanted = output.get("format") or asked.get("output_format")
    if wanted is not None:
        if not isinstance(wanted, dict) or wanted.get("type") != "json_schema":
            raise InvalidRequest("output_config.format", "expected a format of type json_schema")
        schema = {"name": "answer", "schema": wanted.get("schema"), "strict": True}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}


def _effort(given: Any) -> str:
    if not isinstance(given, str) or given not in _EFFORTS:
        raise InvalidRequest("output_config.effort", f"expected one of {', '.join(_EFFORTS)}")
    return _EFFORTS[given]


# --- fields --------------------------------------------------------------------------------------


def _blocks(value: Any, where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    if not isinstance(value, list):
        raise InvalidRequest(where, "a list of objects is required")
    for index, block in enumerate(value):
        at = f"{where}[{index}]"
        if not isinstance(block, dict):
            raise InvalidRequest(at, "an object is required")
        yield block, at


def _text(block: Mapping[str, Any], where: str) -> str:
    if block.get("type") != "text":
        raise InvalidRequest(f"{where}.type", "a text block is required")
    return _string(block, "text", where)


def _string(fields: Mapping[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{name}", "a string is required")
    return value
