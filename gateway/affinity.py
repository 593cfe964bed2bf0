"""Session affinity: which conversation a request belongs to, and whether its expert is worth
keeping. Pure.

Keeping it saves reading the conversation again (its prefix is in that expert's cache) and perhaps
a swap; switching gains whatever the better expert is better by. Both are put into milliseconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from experts.types import Endpoint
from gateway.wire import WireRequest
from policies.types import Affinity, Policy

__all__ = [
    "AffinityOutcome",
    "AffinityView",
    "Conversation",
    "Session",
    "conversation_of",
    "expert_values",
    "sent_session",
    "sticky_policy",
    "worth_keeping",
]

# Names of the headers that clients are known to send, as ASGI spells them (lower case).
SESSION_HEADERS = (
    b"x-session-id",
    b"x-conversation-id",
    b"x-claude-code-session-id",
    b"session_id",
    b"conversation_id",
)
_HEADERS = frozenset(SESSION_HEADERS)
_ID_CHARS_MAX = 512
_HASH_HEX_DIGITS = 32


class AffinityOutcome(StrEnum):
    OFF = "off"  # the policy has none, or an expert was named
    NONE = "none"  # nothing tells which conversation this is
    NEW = "new"
    KEPT = "kept"
    SAME = "same"  # it would have been chosen anyway
    SWITCHED = "switched"
    UNABLE = "unable"  # its expert cannot take this request


class Conversation(msgspec.Struct, frozen=True):
    """``key`` is a digest: neither an id nor a prompt is ever stored. ``source``: where from.

    ``continues``: there may be something to remember; False on a first turn without an id.
    """

    key: str
    source: str
    continues: bool


@dataclass(frozen=True, slots=True)
class Session:
    """What is remembered of a conversation: who answered last, and how long it was by then."""

    expert: str
    category: str
    tokens: int


class AffinityView(msgspec.Struct, frozen=True):
    """What became of affinity in one decision, for ``/v1/route``, records and metrics."""

    outcome: AffinityOutcome
    source: str = ""
    expert: str | None = None
    reason: str = ""


def sent_session(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The conversation's id by the first known header; None when absent, empty or absurdly long."""
    found = {name: value for name, value in headers if name in _HEADERS}
    for name in SESSION_HEADERS:
        value = found.get(name)
        if value and len(value) <= _ID_CHARS_MAX:
            return value.decode("latin-1")
    return None


def conversation_of(request: WireRequest, header: str | None, owner: str) -> Conversation | None:
    """The request's conversation, in this order: ``coe.session_id``, a header, the body's
    ``prompt_cache_key``, ``user`` or ``safety_identifier``, its first turns; None without any.

    The last three name a person or a prompt, not a conversation, so the first turns (everything up
    to the first user message) are part of their key. ``owner`` is the API key's id: callers cannot
    meet in one conversation.
    """
    if request.endpoint is Endpoint.EMBEDDINGS:
        return None
    for source, value in (
        ("session_id", request.coe.session_id),
        ("header", header),
        ("prompt_cache_key", _text(request.body, "prompt_cache_key")),
    ):
        if value:
            return Conversation(_digest(owner, source, value.encode()), source, True)
    turns = _first_turns(request.body)
    if turns is None:
        return None
    for source in ("user", "safety_identifier"):
        if value := _text(request.body, source):
            key = _digest(owner, source, value.encode() + b"\0" + turns)
            return Conversation(key, source, _has_answer(request.body))
    return Conversation(_digest(owner, "turns", turns), "first_turns", _has_answer(request.body))


def expert_values(policy: Policy, posterior: Mapping[str, float]) -> dict[str, float]:
    """Expert -> probability that it is on the right route: the categories that lead to it.

    Of a per-query policy: the expert's mean quality over the categories.
    """
    values: dict[str, float] = {}
    if policy.per_query is not None:
        table = policy.per_query.quality
        for category, probability in posterior.items():
            for expert, quality in (table.get(category) or table["general"]).items():
                values[expert] = values.get(expert, 0.0) + probability * quality
        return values
    for category, probability in posterior.items():
        for expert in policy.routes.get(category, policy.default).experts:
            values[expert] = values.get(expert, 0.0) + probability
    return values


def worth_keeping(
    rules: Affinity,
    *,
    gain: float,
    cached_tokens: int,
    held_wait_ms: float,
    fresh_wait_ms: float,
) -> tuple[bool, str]:
    """Whether to stay, and why in words.

    ``gain``: how much better the other expert is expected to be, -1 to 1. ``cached_tokens``: what
    it would have to read again. The waits are until either could start (queue and swap).
    """
    if rules.mode == "strict":
        return True, "the policy keeps conversations with their expert"
    benefit_ms = gain * rules.quality_worth_ms
    cost_ms = cached_tokens * rules.prefill_ms_per_token + fresh_wait_ms - held_wait_ms
    keep = benefit_ms <= cost_ms
    verb = "not worth" if keep else "worth"
    return keep, f"switching gains {benefit_ms:.0f} ms, {verb} the {cost_ms:.0f} ms it costs"


def sticky_policy(policy: Policy, category: str, expert: str) -> Policy:
    """The policy with this expert first: its place on the route and what follows, or it alone."""
    route = policy.routes.get(category, policy.default).experts
    rest = route[route.index(expert) :] if expert in route else (expert,)
    return policy.with_only_route(rest)


def _first_turns(body: Mapping[str, Any]) -> bytes | None:
    messages = body.get("messages")
    if not isinstance(messages, list):
        return None
    for index, message in enumerate(messages):
        if message.get("role") == "user":
            return msgspec.json.encode(messages[: index + 1])
    return None


def _has_answer(body: Mapping[str, Any]) -> bool:
    return any(message.get("role") == "assistant" for message in body.get("messages") or ())


def _text(body: Mapping[str, Any], name: str) -> str | None:
    value = body.get(name)
    return value if isinstance(value, str) and 0 < len(value) <= _ID_CHARS_MAX else None


def _digest(owner: str, source: str, value: bytes) -> str:
    text = f"{owner}\0{source}\0".encode() + value
    return hashlib.sha256(text).hexdigest()[:_HASH_HEX_DIGITS]
