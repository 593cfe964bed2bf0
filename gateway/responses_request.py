"""OpenAI Responses requests as chat completions. Pure.

Texts, images, tools and tool results keep their order and their bytes. Reasoning items are left
out: chat completions have no place for them. What needs a store of responses, or a tool that runs
on the server, is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from experts.errors import InvalidRequest
from gateway.fields import is_int

__all__ = ["chat_body"]

_NOT_STORED = "responses are not stored here; send the whole conversation as input"
_REFUSED = {
    "previous_response_id": _NOT_STORED,
    "conversation": _NOT_STORED,
    "prompt": "there are no stored prompts here; send instructions and input",
    "background": "answers are not made in the background; leave it out or send false",
}
# Read here, or only repeated in the answer; everything else goes to the expert as it is.
_CONSUMED = frozenset(
    {
        *_REFUSED,
        *("input", "instructions", "text", "reasoning", "include", "store", "truncation"),
        *("max_output_tokens", "max_tool_calls", "top_logprobs", "tools", "tool_choice"),
        *("stream_options", "metadata"),
    }
)
_LOGPROBS = "message.output_text.logprobs"
_MESSAGE_ROLES = frozenset({"user", "assistant", "system", "developer"})


def chat_body(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The chat request that means the same.

    Raises:
        InvalidRequest: a field has the wrong shape, or asks for what only a stateful server can do.
    """
    _refuse(asked)
    body = {key: value for key, value in asked.items() if key not in _CONSUMED}
    body["messages"] = [*_instructions(asked), *_messages(asked.get("input"))]
    _add_tools(body, asked)
    _add_text_options(body, asked)
    _add_logprobs(body, asked)
    if (most := asked.get("max_output_tokens")) is not None:
        if not is_int(most) or most < 1:
            raise InvalidRequest("max_output_tokens", "an integer of at least 1 is required")
        body["max_tokens"] = most
    reasoning = _object(asked, "reasoning")
    if reasoning.get("effort") is not None:
        body["reasoning_effort"] = reasoning["effort"]
    if asked.get("stream"):
        body["stream_options"] = {"include_usage": True}
    return body


def _refuse(asked: Mapping[str, Any]) -> None:
    for name, reason in _REFUSED.items():
        if asked.get(name):
            raise InvalidRequest(name, reason)
    if asked.get("store"):
        raise InvalidRequest("store", "responses are not stored here; leave it out or send false")
    if asked.get("truncation") not in (None, "disabled"):
        raise InvalidRequest("truncation", "input is never cut; only disabled is possible")
    if asked.get("n") not in (None, 1):
        raise InvalidRequest("n", "a response is one answer")
    if asked.get("messages") is not None:
        raise InvalidRequest("messages", "the Responses API takes input")


def _instructions(asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    text = asked.get("instructions")
    if text is None or text == "":
        return []
    if not isinstance(text, str):
        raise InvalidRequest("instructions", "a string is required")
    return [{"role": "system", "content": text}]


# --- input items ---------------------------------------------------------------------------------


def _messages(given: Any) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise InvalidRequest("input", "a string or a list with at least one item is required")
    messages: list[dict[str, Any]] = []
    for index, item in enumerate(given):
        _add_item(messages, item, f"input[{index}]")
    if not messages:
        raise InvalidRequest("input", "holds nothing that a model could read")
    return messages


def _add_item(messages: list[dict[str, Any]], item: Any, where: str) -> None:
    if not isinstance(item, dict):
        raise InvalidRequest(where, "an object is required")
    kind = item.get("type") or ("message" if "role" in item else None)
    if kind == "message":
        messages.append(_message(item, where))
    elif kind == "function_call":
        _add_call(messages, item, where)
    elif kind == "function_call_output":
        messages.append(_output(item, where))
    elif kind == "item_reference":
        raise InvalidRequest(where, _NOT_STORED)
    elif kind != "reasoning":
        raise InvalidRequest(f"{where}.type", f"items of type {kind!r} are not supported")


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = item.get("role")
    if not isinstance(role, str) or role not in _MESSAGE_ROLES:
        known = ", ".join(sorted(_MESSAGE_ROLES))
        raise InvalidRequest(f"{where}.role", f"expected one of {known}")
    content = item.get("content")
    if isinstance(content, str):
        return {"role": role, "content": content}
    parts = [_part(part, at) for part, at in _listed(content, f"{where}.content")]
    refusals = [part["refusal"] for part in parts if part["type"] == "refusal"]
    parts = [part for part in parts if part["type"] != "refusal"]
    message: dict[str, Any] = {"role": role, "content": _content(parts, joined=role != "user")}
    return message | ({"refusal": "".join(refusals)} if refusals else {})


def _listed(value: Any, where: str) -> Iterable[tuple[Mapping[str, Any], str]]:
    if not isinstance(value, list):
        raise InvalidRequest(where, "a string or a list of parts is required")
    for index, part in enumerate(value):
        at = f"{where}[{index}]"
        if not isinstance(part, dict):
            raise InvalidRequest(at, "an object is required")
        yield part, at


def _part(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    match part.get("type"):
        case "input_text" | "output_text" | "text":
            return {"type": "text", "text": _text(part, "text", where)}
        case "refusal":
            return {"type": "refusal", "refusal": _text(part, "refusal", where)}
        case "input_image":
            return _image(part, where)
        case "input_audio":
            return dict(part)
        case "input_file" if isinstance(part.get("file_data"), str):
            fields = {k: part[k] for k in ("filename", "file_data") if part.get(k) is not None}
            return {"type": "file", "file": fields}
        case "input_file":
            raise InvalidRequest(where, "no files are stored here; send file_data")
        case kind:
            raise InvalidRequest(f"{where}.type", f"parts of type {kind!r} are not supported")


def _image(part: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(part.get("image_url"), str):
        raise InvalidRequest(where, "no files are stored here; send image_url")
    image = {"url": part["image_url"]}
    if part.get("detail") is not None:
        image["detail"] = part["detail"]
    return {"type": "image_url", "image_url": image}


def _text(fields: Mapping[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}.{name}", "a string is required")
    return value


def _content(parts: list[dict[str, Any]], *, joined: bool) -> Any:
    """A string where that says the same; servers understand it everywhere."""
    if all(part["type"] == "text" for part in parts) and (joined or len(parts) == 1):
        return "".join(part["text"] for part in parts)
    return parts


def _add_call(messages: list[dict[str, Any]], item: Mapping[str, Any], where: str) -> None:
    """Calls that follow each other, or the assistant's words, are one turn."""
    function = {name: _text(item, name, where) for name in ("name", "arguments")}
    call = {"id": _text(item, "call_id", where), "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})


def _output(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    output = item.get("output")
    if not isinstance(output, str):
        parts = [_part(part, at) for part, at in _listed(output, f"{where}.output")]
        output = _content(parts, joined=True)
    return {"role": "tool", "tool_call_id": _text(item, "call_id", where), "content": output}


# --- tools and options ---------------------------------------------------------------------------


def _add_tools(body: dict[str, Any], asked: Mapping[str, Any]) -> None:
    tools = asked.get("tools")
    if tools is not None:
        if not isinstance(tools, list):
            raise InvalidRequest("tools", "a list of objects is required")
        body["tools"] = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
        if not tools:
            del body["tools"]
    choice = asked.get("tool_choice")
    if choice is not None:
        body["tool_choice"] = _tool_choice(choice)


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise InvalidRequest(where, "an object is required")
    if tool.get("type") != "function":
        kind = tool.get("type")
        raise InvalidRequest(f"{where}.type", f"{kind!r} is no function; no tool runs here")
    _text(tool, "name", where)
    known = ("name", "description", "parameters", "strict")
    function = {name: tool[name] for name in known if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, str):
        return choice
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "function":
        return {"type": "function", "function": {"name": _text(choice, "name", "tool_choice")}}
    if kind == "allowed_tools":
        named = [
            {"type": "function", "function": {"name": _text(tool, "name", at)}}
            for tool, at in _listed(choice.get("tools"), "tool_choice.tools")
        ]
        return {"type": kind, kind: {"mode": choice.get("mode", "auto"), "tools": named}}
    raise InvalidRequest(
        "tool_choice", "expected auto, none, required, a function or allowed_tools"
    )


def _add_text_options(body: dict[str, Any], asked: Mapping[str, Any]) -> None:
    options = _object(asked, "text")
    if options.get("verbosity") is not None:
        body["verbosity"] = options["verbosity"]
    wanted = _object(options, "format", "text.")
    match wanted.get("type"):
        case None | "text":
            return
        case "json_object":
            body["response_format"] = {"type": "json_object"}
        case "json_schema":
            known = ("name", "description", "schema", "strict")
            schema = {name: wanted[name] for name in known if wanted.get(name) is not None}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        case kind:
            raise InvalidRequest("text.format.type", f"{kind!r} is not supported")


def _add_logprobs(body: dict[str, Any], asked: Mapping[str, Any]) -> None:
    include = asked.get("include") or []
    if not isinstance(include, list):
        raise InvalidRequest("include", "a list of strings is required")
    top = asked.get("top_logprobs")
    if _LOGPROBS in include or top:
        body["logprobs"] = True
    if top is not None:
        body["logprobs"] = True
        body["top_logprobs"] = top


def _object(fields: Mapping[str, Any], name: str, where: str = "") -> Mapping[str, Any]:
    value = fields.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(where + name, "an object is required")
    return value
