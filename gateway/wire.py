"""OpenAI request bodies at the edge: checked as far as we rely on them, otherwise passed on whole.

The body stays a plain dict so that fields nobody here knows reach the expert unharmed. Everything
the gateway itself decides by is read out once, into ``WireRequest``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from experts.errors import InvalidRequest
from experts.types import Capability, Endpoint
from gateway.coe_options import CoeOptions, coe_options, model_list
from gateway.fields import is_int, is_number, optional_boolean
from gateway.prompt_texts import body_texts, is_media, texts_within

__all__ = [
    "CoeOptions",
    "WireRequest",
    "decoded_object",
    "parse_body",
    "parse_request",
    "routing_text",
]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
CHOICES_MAX = 128
INPUTS_MAX = 2048
DIMENSIONS_MAX = 65_536
TOP_LOGPROBS_MAX = 20
ROUTING_CHARS_MAX = 8_000  # the router windows this further; it bounds what is copied for it
_COUNTED = frozenset({"role", "content"})
_TYPE = frozenset({"type"})
_SHORT_TURN_CHARS = 80  # "and in French?" cannot be classified without the turn before
_EARLIER_CHARS_MAX = 500

_PROMPT_FIELD = {
    Endpoint.CHAT: "messages",
    Endpoint.COMPLETIONS: "prompt",
    Endpoint.EMBEDDINGS: "input",
}
_CAPABILITY_OF_PART = {
    "image_url": Capability.IMAGES,
    "input_image": Capability.IMAGES,
    "input_audio": Capability.AUDIO,
    "audio_url": Capability.AUDIO,
}


class WireRequest(msgspec.Struct, frozen=True):
    """A checked request.

    ``body`` is what the caller sent, less ``coe`` and ``models``. ``models``: experts in the order
    in which to try them. ``texts`` are all texts of the prompt, for counting; ``prompt_ids`` counts
    prompt tokens that came as ids, ``prompt_ids_max`` those of the longest prompt. ``choices`` is
    how many answers one call of an expert makes. ``asked`` is the request of another API that this
    one was translated from; ``prompt_field`` is where that has its prompt, for errors.
    """

    endpoint: Endpoint
    model: str
    body: Mapping[str, Any]
    stream: bool
    include_usage: bool
    wants_logprobs: bool
    choices: int
    max_output_tokens: int | None
    routing_text: str
    texts: tuple[str, ...]
    prompt_ids: int
    message_count: int
    capabilities: frozenset[Capability]
    coe: CoeOptions
    models: tuple[str, ...] = ()
    prompt_ids_max: int = 0
    asked: Mapping[str, Any] | None = None
    prompt_field: str = "messages"

    @property
    def prompt_chars(self) -> int:
        return sum(map(len, self.texts))


def parse_request(raw: bytes, endpoint: Endpoint) -> WireRequest:
    """Decode and check a request body.

    Raises:
        InvalidRequest: not JSON, or a field we rely on is missing, of the wrong type or out of
            range; the error names the field.
    """
    return parse_body(decoded_object(raw), endpoint)


def parse_body(
    body: dict[str, Any],
    endpoint: Endpoint,
    *,
    asked: Mapping[str, Any] | None = None,
    prompt_field: str | None = None,
) -> WireRequest:
    """As ``parse_request``, from a decoded body, which becomes the request's own.

    ``prompt_field``: the endpoint's own unless given.

    Raises InvalidRequest.
    """
    coe = coe_options(body.pop("coe", None))
    models = model_list(body.pop("models", None), "models") or coe.models
    model = body.get("model") or (models[0] if models else None)
    if not isinstance(model, str) or not model:
        raise InvalidRequest("model", "a non-empty string is required")
    _check_numbers(body)
    stream = optional_boolean(body, "stream")
    prompt = _PROMPTS[endpoint](body)
    wants_logprobs = _wants_logprobs(body, endpoint)
    return WireRequest(
        endpoint=endpoint,
        model=model,
        body=body,
        stream=stream,
        include_usage=_include_usage(body, stream),
        wants_logprobs=wants_logprobs,
        choices=_choices(body, prompt.count) if endpoint is not Endpoint.EMBEDDINGS else 1,
        max_output_tokens=_max_output_tokens(body),
        routing_text=prompt.routing_text,
        texts=prompt.texts,
        prompt_ids=prompt.ids,
        message_count=len(body.get("messages") or ()),
        capabilities=_capabilities(body, endpoint, prompt, wants_logprobs),
        coe=coe,
        models=models,
        prompt_ids_max=prompt.ids_max,
        asked=asked,
        prompt_field=prompt_field or _PROMPT_FIELD[endpoint],
    )


def decoded_object(raw: bytes) -> dict[str, Any]:
    """A JSON object. Raises InvalidRequest."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(None, f"The body is not valid JSON: {error}.") from error
    if not isinstance(body, dict):
        raise InvalidRequest(None, "The body must be a JSON object.")
    return body


# --- prompts -------------------------------------------------------------------------------------


class _Prompt(msgspec.Struct, frozen=True):
    texts: tuple[str, ...]
    routing_text: str
    part_types: frozenset[str] = frozenset()
    ids: int = 0
    ids_max: int = 0
    count: int = 1


def _chat_prompt(body: Mapping[str, Any]) -> _Prompt:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages", "a list with at least one message is required")
    texts: list[str] = []
    part_types: set[str] = set()
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]", texts, part_types)
    texts.extend(body_texts(body))
    return _Prompt(tuple(texts), routing_text(messages), frozenset(part_types))


def _check_message(message: Any, where: str, texts: list[str], part_types: set[str]) -> None:
    if not isinstance(message, dict):
        raise InvalidRequest(where, "an object is required")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(sorted(ROLES))
        raise InvalidRequest(f"{where}.role", f"expected one of {known}")
    content = message.get("content")
    if isinstance(content, str):
        texts.append(content)
    elif isinstance(content, list):
        for index, part in enumerate(content):
            _check_part(part, f"{where}.content[{index}]", texts, part_types)
    elif content is not None:
        raise InvalidRequest(f"{where}.content", "expected a string, a list of parts or null")
    elif role != "assistant":
        raise InvalidRequest(f"{where}.content", f"a {role} message needs content")
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise InvalidRequest(f"{where}.tool_calls", "a list is required")
    for call in calls:
        _check_call(call, where)
    if len(message) > 2:  # more than a role and its content
        texts.extend(texts_within(message, skip=_COUNTED))


def _check_part(part: Any, where: str, texts: list[str], part_types: set[str]) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise InvalidRequest(where, "an object with a type is required")
    part_types.add(part["type"])
    if part["type"] in ("text", "input_text") and not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{where}.text", "a string is required")
    if not is_media(part["type"]):
        texts.extend(texts_within(part, skip=_TYPE))


def _check_call(call: Any, where: str) -> None:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise InvalidRequest(f"{where}.tool_calls", "each call needs a function object")


def routing_text(messages: Iterable[Mapping[str, Any]]) -> str:
    """The user's own words that decide the route: the last user turn.

    A short last turn ("and in French?") gets the user's earlier turns before it, newest first and
    bounded, because alone it says nothing about the subject. System prompts, tool results and the
    assistant's words are left out: they are not what the user asks.
    """
    turns = [text for m in messages if m["role"] == "user" and (text := _content_text(m))]
    if not turns:
        return ""
    last = _window(turns[-1], ROUTING_CHARS_MAX)
    room = _EARLIER_CHARS_MAX
    earlier: list[str] = []
    for turn in reversed(turns[:-1]):
        if len(last) >= _SHORT_TURN_CHARS or room <= 0:
            break
        earlier.append(turn[:room])
        room -= len(earlier[-1])
    return "\n".join([*reversed(earlier), last])


def _content_text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    return "\n".join(part["text"] for part in parts if isinstance(part.get("text"), str))


def _window(text: str, chars: int) -> str:
    """Head and tail of a long text: the question may stand before or behind pasted data."""
    return text if len(text) <= chars else text[: chars // 2] + "\n" + text[-(chars // 2) :]


def _text_prompt(body: Mapping[str, Any]) -> _Prompt:
    return _texts_or_ids(body, "prompt")


def _texts_or_ids(body: Mapping[str, Any], where: str) -> _Prompt:
    if body.get("messages") is not None:  # whoever it is for, it is not read here
        raise InvalidRequest("messages", f"this endpoint takes {where}")
    prompt = body.get(where)
    if isinstance(prompt, str):
        return _Prompt((prompt,), _window(prompt, ROUTING_CHARS_MAX))
    if not isinstance(prompt, list) or not prompt:
        raise InvalidRequest(where, "a string, a list of strings or token ids is required")
    if all(isinstance(item, str) for item in prompt):
        return _Prompt(tuple(prompt), _window(prompt[0], ROUTING_CHARS_MAX), count=len(prompt))
    if all(is_int(item) for item in prompt):
        return _Prompt((), "", ids=len(prompt), ids_max=len(prompt))
    if all(isinstance(item, list) and item and all(map(is_int, item)) for item in prompt):
        sizes = [len(item) for item in prompt]
        return _Prompt((), "", ids=sum(sizes), ids_max=max(sizes), count=len(prompt))
    raise InvalidRequest(where, "mixes strings and token ids, or holds something else")


def _inputs(body: Mapping[str, Any]) -> _Prompt:
    """What is to be embedded. Raises InvalidRequest."""
    prompt = _texts_or_ids(body, "input")
    if not all(prompt.texts):
        raise InvalidRequest("input", "an empty text has no embedding")
    if prompt.count > INPUTS_MAX:
        raise InvalidRequest("input", f"at most {INPUTS_MAX} inputs per request")
    if body.get("encoding_format") not in (None, "float", "base64"):
        raise InvalidRequest("encoding_format", "expected float or base64")
    dimensions = body.get("dimensions")
    if dimensions is not None and not (is_int(dimensions) and 1 <= dimensions <= DIMENSIONS_MAX):
        raise InvalidRequest("dimensions", f"an integer from 1 to {DIMENSIONS_MAX} is required")
    if body.get("stream"):
        raise InvalidRequest("stream", "embeddings are not streamed")
    return msgspec.structs.replace(prompt, count=1)  # one answer, however many inputs


_PROMPTS: Mapping[Endpoint, Callable[[Mapping[str, Any]], _Prompt]] = {
    Endpoint.CHAT: _chat_prompt,
    Endpoint.COMPLETIONS: _text_prompt,
    Endpoint.EMBEDDINGS: _inputs,
}
_NEEDED = {
    Endpoint.CHAT: Capability.CHAT,
    Endpoint.COMPLETIONS: Capability.COMPLETIONS,
    Endpoint.EMBEDDINGS: Capability.EMBEDDINGS,
}


def _capabilities(
    body: Mapping[str, Any], endpoint: Endpoint, prompt: _Prompt, wants_logprobs: bool
) -> frozenset[Capability]:
    needed = {_NEEDED[endpoint]}
    needed |= {_CAPABILITY_OF_PART[t] for t in prompt.part_types if t in _CAPABILITY_OF_PART}
    if body.get("tools") or body.get("functions"):
        needed.add(Capability.TOOLS)
        # Only if asked for in so many words: it is the default, and most callers do not mean it.
        if optional_boolean(body, "parallel_tool_calls"):
            needed.add(Capability.PARALLEL_TOOLS)
    if "audio" in _modalities(body):
        needed.add(Capability.AUDIO)
    if wants_logprobs:
        needed.add(Capability.LOGPROBS)
    response_format = body.get("response_format")
    if response_format is not None:
        if not isinstance(response_format, dict):
            raise InvalidRequest("response_format", "an object is required")
        if response_format.get("type") == "json_schema":
            needed.add(Capability.JSON_SCHEMA)
    return frozenset(needed)


def _modalities(body: Mapping[str, Any]) -> list[str]:
    value = body.get("modalities")
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidRequest("modalities", "a list of strings is required")
    return value


# --- fields --------------------------------------------------------------------------------------


def _check_numbers(body: Mapping[str, Any]) -> None:
    for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty"):
        if body.get(name) is not None and not is_number(body[name]):
            raise InvalidRequest(name, "a number is required")
    for name in ("max_tokens", "max_completion_tokens", "n", "best_of"):
        if body.get(name) is not None and (not is_int(body[name]) or body[name] < 1):
            raise InvalidRequest(name, "an integer of at least 1 is required")
    tools = body.get("tools")
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)
    ):
        raise InvalidRequest("tools", "a list of objects is required")
    stop = body.get("stop")
    if stop is not None and not (
        isinstance(stop, str)
        or (isinstance(stop, list) and all(isinstance(item, str) for item in stop))
    ):
        raise InvalidRequest("stop", "a string or a list of strings is required")


def _include_usage(body: Mapping[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise InvalidRequest("stream_options", "an object is required")
    if not stream:
        raise InvalidRequest("stream_options", "only allowed when stream is true")
    return optional_boolean(options, "include_usage", "stream_options.")


def _wants_logprobs(body: Mapping[str, Any], endpoint: Endpoint) -> bool:
    if endpoint is Endpoint.EMBEDDINGS:
        return False
    if endpoint is Endpoint.COMPLETIONS:
        count = body.get("logprobs")
        if count is not None and not (is_int(count) and 0 <= count <= TOP_LOGPROBS_MAX):
            raise InvalidRequest("logprobs", f"an integer from 0 to {TOP_LOGPROBS_MAX} is required")
        return count is not None
    asked = optional_boolean(body, "logprobs")
    top = body.get("top_logprobs")
    if top is not None:
        if not (is_int(top) and 0 <= top <= TOP_LOGPROBS_MAX):
            raise InvalidRequest(
                "top_logprobs", f"an integer from 0 to {TOP_LOGPROBS_MAX} is required"
            )
        if not asked:
            raise InvalidRequest("top_logprobs", "only allowed when logprobs is true")
    return asked


def _choices(body: Mapping[str, Any], prompts: int) -> int:
    n, best_of = body.get("n") or 1, body.get("best_of") or 1
    choices = max(n, best_of) * prompts
    if choices > CHOICES_MAX:
        at_fault = "prompt" if prompts > CHOICES_MAX else "best_of" if best_of > n else "n"
        raise InvalidRequest(at_fault, f"at most {CHOICES_MAX} answers per request")
    return choices


def _max_output_tokens(body: Mapping[str, Any]) -> int | None:
    """The tighter of the two spellings, per choice; the call of an expert says it in both."""
    given = [v for k in ("max_completion_tokens", "max_tokens") if (v := body.get(k)) is not None]
    return min(given) if given else None
