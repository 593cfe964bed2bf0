"""Session affinity as decisions: whose conversation, and whether its expert is worth keeping."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.types import Endpoint
from gateway.affinity import (
    Conversation,
    conversation_of,
    expert_values,
    sent_session,
    sticky_policy,
    worth_keeping,
)
from gateway.wire import WireRequest, parse_request
from policies.loader import parse_policy
from policies.types import Affinity

FIRST = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one"}]
LATER = [*FIRST, {"role": "assistant", "content": "1"}, {"role": "user", "content": "two"}]
POLICY = """
version: 1
routes: {sql: a, math: [b, c]}
default: a
caps: {stages: 2, cost_usd: 1}
cascade: {calibration: {b: {slope: 1, intercept: 0}}}
"""


def request(messages: list[Any], **fields: Any) -> WireRequest:
    body = {"model": "auto", "messages": messages, **fields}
    return parse_request(msgspec.json.encode(body), Endpoint.CHAT)


def found(messages: list[Any], header: str | None = None, **fields: Any) -> Conversation:
    conversation = conversation_of(request(messages, **fields), header, "key")
    assert conversation is not None
    return conversation


def test_the_order_in_which_a_conversation_is_recognised() -> None:
    fields: dict[str, Any] = {"safety_identifier": "s", "user": "u", "prompt_cache_key": "p"}
    sources = [found(FIRST, "h", **fields, coe={"session_id": "i"}).source]
    sources.append(found(FIRST, "h", **fields).source)
    for name in ("prompt_cache_key", "user", "safety_identifier"):
        sources.append(found(FIRST, None, **fields).source)
        del fields[name]
    sources.append(found(FIRST).source)
    assert sources == [
        "session_id",
        "header",
        "prompt_cache_key",
        "user",
        "safety_identifier",
        "first_turns",
    ]


def test_later_turns_belong_to_the_same_conversation_and_only_they_are_looked_up() -> None:
    for fields in ({}, {"user": "u"}):
        first, later = found(FIRST, **fields), found(LATER, **fields)
        assert first.key == later.key
        assert (first.continues, later.continues) == (False, True)
    assert found(FIRST, coe={"session_id": "i"}).continues, "an id may be known from before"


def test_two_conversations_of_one_user_are_two() -> None:
    other = [{"role": "user", "content": "something else"}]
    assert found(FIRST, user="u").key != found(other, user="u").key
    assert found(FIRST, user="u").key != found(FIRST, user="v").key


def test_callers_never_meet_and_nothing_readable_is_stored() -> None:
    asked = request(FIRST, coe={"session_id": "secret-id"})
    one, other = (conversation_of(asked, None, owner) for owner in ("key 1", "key 2"))
    assert one is not None
    assert other is not None
    assert one.key != other.key
    assert "secret" not in one.key


def test_a_prompt_without_turns_is_no_conversation() -> None:
    raw = b'{"model": "auto", "prompt": "x"}'
    assert conversation_of(parse_request(raw, Endpoint.COMPLETIONS), None, "") is None


def test_headers_that_clients_are_known_to_send() -> None:
    headers = [(b"accept", b"*/*"), (b"x-conversation-id", b"c"), (b"x-session-id", b"")]
    assert sent_session(headers) == "c"
    assert sent_session([(b"x-session-id", b"s"), *headers]) is not None
    assert sent_session([(b"x-session-id", b"s" * 600)]) is None
    assert sent_session([]) is None


def test_an_expert_s_value_is_the_probability_of_its_categories() -> None:
    policy = parse_policy(POLICY, name="p", file="p", catalogue_ids=None)
    values = expert_values(policy, {"sql": 0.5, "math": 0.3, "other": 0.2})
    assert values == pytest.approx({"a": 0.7, "b": 0.3, "c": 0.3})


@pytest.mark.parametrize(
    ("gain", "tokens", "held_ms", "fresh_ms", "keep"),
    [
        (0.0, 0, 0, 0, True),  # nothing to gain
        (0.9, 100, 0, 0, False),  # another subject, little to read again
        (0.9, 30_000, 0, 0, True),  # a long conversation
        (0.9, 100, 0, 6_000, True),  # the better expert would have to be swapped in
        (0.1, 100, 9_000, 0, False),  # the old one would
        (-0.5, 0, 0, 0, True),
    ],
)
def test_switching_has_to_be_worth_what_it_costs(
    gain: float, tokens: int, held_ms: float, fresh_ms: float, keep: bool
) -> None:
    kept, reason = worth_keeping(
        Affinity(),
        gain=gain,
        cached_tokens=tokens,
        held_wait_ms=held_ms,
        fresh_wait_ms=fresh_ms,
    )
    assert kept is keep
    assert "ms" in reason


@settings(deadline=None)
@given(st.floats(-1, 1), st.integers(0, 10**6), st.floats(0, 10**5), st.integers(0, 10**6))
def test_pain_25_the_longer_a_conversation_the_more_its_cache_holds_it(
    gain: float, tokens: int, fresh_ms: float, more: int
) -> None:
    def keep(count: int) -> bool:
        waits = {"held_wait_ms": 0.0, "fresh_wait_ms": fresh_ms}
        return worth_keeping(Affinity(), gain=gain, cached_tokens=count, **waits)[0]

    assert keep(tokens + more) or not keep(tokens)


def test_staying_means_the_rest_of_the_route_and_the_policy_s_own_caps() -> None:
    policy = parse_policy(POLICY, name="p", file="p", catalogue_ids=None)
    assert sticky_policy(policy, "math", "c").default.experts == ("c",)
    assert sticky_policy(policy, "math", "b").default.experts == ("b", "c")
    kept = sticky_policy(policy, "math", "a")
    assert (kept.routes, kept.default.experts) == ({}, ("a",))
    assert (kept.caps, kept.digest, kept.name) == (policy.caps, policy.digest, policy.name)
