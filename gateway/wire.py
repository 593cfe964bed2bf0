"""OpenAI request bodies at the edge: checked as far as we rely on them, otherwise passed on whole.

The body stays a plain dict so that fields nobody here knows reach the expert unharmed. Everything
the gateway itself decides by is read out once, into ``WireRequest``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import msgspec

from experts.errors import InvalidRequest
from experts.types import MICRO_USD_PER_USD, Capability, Endpoint
from policies.types import Overrides

__all__ = ["CoeOptions", "WireRequest", "parse_request", "routing_text"]

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
CHOICES_MAX = 128
TOP_LOGPROBS_MAX = 20
ROUTING_CHARS_MAX = 8_000  # the router windows this further; it bounds what is copied for it
_SHORT_TURN_CHARS = 80  # "and in French?" cannot be classified without the turn before
_EARLIER_CHARS_MAX = 500

_CAPABILITY_OF_PART = {
    "image_url": Capability.IMAGES,
    "input_image": Capability.IMAGES,
    "input_audio": Capability.AUDIO,
    "audio_url": Capability.AUDIO,
}


@dataclass(frozen=True, slots=True)
class CoeOptions:
    """The request's own ``coe`` object."""

    overrides: Overrides = field(default_factory=Overrides)
    policy: str | None = None
    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()
    session_id: str | None = None
    explain: bool = False


@dataclass(frozen=True, slots=True)
class WireRequest:
    """A checked request.

    ``body`` is what the caller sent, less ``coe``. ``texts`` are all texts of the prompt, for
    counting; ``prompt_ids`` counts prompt tokens that came as ids. ``choices`` is how many answers
    one call of an expert makes.
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

    @property
    def prompt_chars(self) -> int:
        return sum(map(len, self.texts))


def parse_request(raw: bytes, endpoint: Endpoint) -> WireRequest:
    """Decode and check a request body.

    Raises:
        InvalidRequest: not JSON, or a field we rely on is missing, of the wrong type or out of
            range; the error names the field.
    """
    body = _decoded(raw)
    coe = _coe_options(body.pop("coe", None))
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest("model", "a non-empty string is required")
    _check_numbers(body)
    stream = _boolean(body, "stream")
    prompt = _chat_prompt(body) if endpoint is Endpoint.CHAT else _text_prompt(body)
    wants_logprobs = _wants_logprobs(body, endpoint)
    return WireRequest(
        endpoint=endpoint,
        model=model,
        body=body,
        stream=stream,
        include_usage=_include_usage(body, stream),
        wants_logprobs=wants_logprobs,
        choices=_choices(body, prompt.count),
        max_output_tokens=_max_output_tokens(body),
        routing_text=prompt.routing_text,
        texts=prompt.texts,
        prompt_ids=prompt.ids,
        message_count=len(body.get("messages") or ()),
        capabilities=_capabilities(body, endpoint, prompt, wants_logprobs),
        coe=coe,
    )


def _decoded(raw: bytes) -> dict[str, Any]:
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(None, f"The body is not valid JSON: {error}.") from error
    if not isinstance(body, dict):
        raise InvalidRequest(None, "The body must be a JSON object.")
    return body


# --- prompts -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Prompt:
    texts: tuple[str, ...]
    routing_text: str
    part_types: frozenset[str] = frozenset()
    ids: int = 0
    count: int = 1


def _chat_prompt(body: Mapping[str, Any]) -> _Prompt:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages", "a list with at least one message is required")
    texts: list[str] = []
    part_types: set[str] = set()
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]", texts, part_types)
    return _Prompt(tuple(texts), routing_text(messages), frozenset(part_types))


def _check_message(message: Any, where: str, texts: list[str], part_types: set[str]) -> None:
    if not isinstance(message, dict):
        raise InvalidRequest(where, "an object is required")
    role = message.get("role")
    if role not in ROLES:
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
    texts.extend(_call_text(call, where) for call in calls)


def _check_part(part: Any, where: str, texts: list[str], part_types: set[str]) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise InvalidRequest(where, "an object with a type is required")
    part_types.add(part["type"])
    if part["type"] in ("text", "input_text"):
        if not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{where}.text", "a string is required")
        texts.append(part["text"])


def _call_text(call: Any, where: str) -> str:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise InvalidRequest(f"{where}.tool_calls", "each call needs a function object")
    return f"{function.get('name', '')}{function.get('arguments', '')}"


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
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return _Prompt((prompt,), _window(prompt, ROUTING_CHARS_MAX))
    if not isinstance(prompt, list) or not prompt:
        raise InvalidRequest("prompt", "a string, a list of strings or token ids is required")
    if all(isinstance(item, str) for item in prompt):
        return _Prompt(tuple(prompt), _window(prompt[0], ROUTING_CHARS_MAX), count=len(prompt))
    if all(_is_int(item) for item in prompt):
        return _Prompt((), "", ids=len(prompt))
    if all(isinstance(item, list) and item and all(map(_is_int, item)) for item in prompt):
        return _Prompt((), "", ids=sum(map(len, prompt)), count=len(prompt))
    raise InvalidRequest("prompt", "mixes strings and token ids, or holds something else")


def _capabilities(
    body: Mapping[str, Any], endpoint: Endpoint, prompt: _Prompt, wants_logprobs: bool
) -> frozenset[Capability]:
    chat = endpoint is Endpoint.CHAT
    needed = {Capability.CHAT if chat else Capability.COMPLETIONS}
    needed |= {_CAPABILITY_OF_PART[t] for t in prompt.part_types if t in _CAPABILITY_OF_PART}
    if body.get("tools") or body.get("functions"):
        needed.add(Capability.TOOLS)
    if wants_logprobs:
        needed.add(Capability.LOGPROBS)
    response_format = body.get("response_format")
    if response_format is not None:
        if not isinstance(response_format, dict):
            raise InvalidRequest("response_format", "an object is required")
        if response_format.get("type") == "json_schema":
            needed.add(Capability.JSON_SCHEMA)
    return frozenset(needed)


# --- fields --------------------------------------------------------------------------------------


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_numbers(body: Mapping[str, Any]) -> None:
    for name in ("temperature", "top_p", "presence_penalty", "frequency_penalty"):
        if body.get(name) is not None and not _is_number(body[name]):
            raise InvalidRequest(name, "a number is required")
    for name in ("max_tokens", "max_completion_tokens", "n", "best_of"):
        if body.get(name) is not None and (not _is_int(body[name]) or body[name] < 1):
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


def _boolean(fields: Mapping[str, Any], name: str, where: str = "") -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(where + name, "true or false is required")
    return bool(value)


def _include_usage(body: Mapping[str, Any], stream: bool) -> bool:
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict):
        raise InvalidRequest("stream_options", "an object is required")
    if not stream:
        raise InvalidRequest("stream_options", "only allowed when stream is true")
    return _boolean(options, "include_usage", "stream_options.")


def _wants_logprobs(body: Mapping[str, Any], endpoint: Endpoint) -> bool:
    if endpoint is Endpoint.COMPLETIONS:
        count = body.get("logprobs")
        if count is not None and not (_is_int(count) and 0 <= count <= TOP_LOGPROBS_MAX):
            raise InvalidRequest("logprobs", f"an integer from 0 to {TOP_LOGPROBS_MAX} is required")
        return count is not None
    asked = _boolean(body, "logprobs")
    top = body.get("top_logprobs")
    if top is not None:
        if not (_is_int(top) and 0 <= top <= TOP_LOGPROBS_MAX):
            raise InvalidRequest(
                "top_logprobs", f"an integer from 0 to {TOP_LOGPROBS_MAX} is required"
            )
        if not asked:
            raise InvalidRequest("top_logprobs", "only allowed when logprobs is true")
    return asked


def _choices(body: Mapping[str, Any], prompts: int) -> int:
    per_prompt = max(body.get("n") or 1, body.get("best_of") or 1)
    if per_prompt * prompts > CHOICES_MAX:
        raise InvalidRequest("n", f"at most {CHOICES_MAX} answers per request")
    return per_prompt * prompts


def _max_output_tokens(body: Mapping[str, Any]) -> int | None:
    """The tighter of the two spellings, per choice."""
    given = [v for k in ("max_completion_tokens", "max_tokens") if (v := body.get(k)) is not None]
    return min(given) if given else None


# --- the coe object ------------------------------------------------------------------------------

_COE_KEYS = ("max_cost_usd", "deadline_ms", "policy", "allow", "deny", "session_id", "explain")
_SESSION_CHARS_MAX = 128


def _coe_options(coe: Any) -> CoeOptions:
    if coe is None:
        return CoeOptions()
    if not isinstance(coe, dict):
        raise InvalidRequest("coe", "an object is required")
    _refuse_unknown(coe)
    allow = _names(coe, "allow")
    return CoeOptions(
        overrides=Overrides(
            max_cost_micro_usd=_micro_usd(coe), deadline_ms=_positive(coe, "deadline_ms")
        ),
        policy=_string(coe, "policy"),
        allow=allow,
        deny=_names(coe, "deny") or frozenset(),
        session_id=_string(coe, "session_id", chars_max=_SESSION_CHARS_MAX),
        explain=_boolean(coe, "explain", "coe."),
    )


def _refuse_unknown(coe: Mapping[str, Any]) -> None:
    for key in coe:
        if key not in _COE_KEYS:
            near = difflib.get_close_matches(key, _COE_KEYS, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(_COE_KEYS)}."
            raise InvalidRequest(f"coe.{key}", f"unknown option. {hint}")


def _micro_usd(coe: Mapping[str, Any]) -> int | None:
    value = coe.get("max_cost_usd")
    if value is None:
        return None
    if not _is_number(value) or value < 0:
        raise InvalidRequest("coe.max_cost_usd", "a number of at least 0 is required")
    return int(Decimal(str(value)) * MICRO_USD_PER_USD)  # rounded down: a cap is never widened


def _positive(coe: Mapping[str, Any], name: str) -> float | None:
    value = coe.get(name)
    if value is None:
        return None
    if not _is_number(value) or value <= 0:
        raise InvalidRequest(f"coe.{name}", "a number above 0 is required")
    return float(value)


def _string(coe: Mapping[str, Any], name: str, chars_max: int = 256) -> str | None:
    value = coe.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= chars_max:
        raise InvalidRequest(f"coe.{name}", f"a string of 1 to {chars_max} characters is required")
    return value


def _names(coe: Mapping[str, Any], name: str) -> frozenset[str] | None:
    value = coe.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidRequest(f"coe.{name}", "a list of expert ids is required")
    return frozenset(value)
