"""Keys as values: how a secret is made and read, what a scope permits, how times are written."""

from __future__ import annotations

import hashlib

import pytest

from gateway.keys import (
    BUDGET_MAX_MICRO_USD,
    RATE_MAX,
    KeyBudgets,
    KeyLimits,
    KeyRecord,
    KeyScope,
    digest_of,
    key_id,
    key_secret,
    looks_like_a_key,
    sent_secret,
    written_duration,
)


def test_a_secret_carries_all_its_random_bits_and_its_id_none_of_them() -> None:
    one, other = key_secret(bytes(32)), key_secret(bytes(31) + b"\x01")
    assert one != other
    assert one == "coe-sk-" + "A" * 43
    assert looks_like_a_key(one)
    assert digest_of(one) == hashlib.sha256(one.encode()).hexdigest()
    assert key_id(digest_of(one)) == "key-" + digest_of(one)[:16]
    with pytest.raises(ValueError):
        key_secret(bytes(16))


@pytest.mark.parametrize("text", ["unused", "", "coe-sk-", "sk-" + "A" * 43, "coe-sk-" + "A" * 44])
def test_what_cannot_be_a_key(text: str) -> None:
    assert not looks_like_a_key(text)


@pytest.mark.parametrize(
    ("name", "value", "secret"),
    [
        (b"authorization", b"Bearer abc", "abc"),
        (b"authorization", b"bearer  abc ", "abc"),
        (b"authorization", b"Bearer ", None),
        (b"authorization", b"Basic abc", None),
        (b"x-api-key", b"abc", "abc"),
        (b"x-other", b"abc", None),
    ],
)
def test_where_a_secret_may_stand(name: bytes, value: bytes, secret: str | None) -> None:
    assert sent_secret([(b"host", b"x"), (name, value)]) == secret


def test_a_record_shows_no_digest() -> None:
    digest = digest_of(key_secret(bytes(32)))
    assert digest not in repr(KeyRecord(key_id(digest), digest, "n", 0))


@pytest.mark.parametrize(
    ("scope", "policy", "served", "named"),
    [
        (KeyScope(), True, True, True),
        (KeyScope(policies=frozenset({"p"})), True, True, False),
        (KeyScope(policies=frozenset({"q"})), False, True, False),
        (KeyScope(experts=frozenset({"e"})), True, True, True),
        (KeyScope(experts=frozenset({"f"})), True, False, False),
        (KeyScope(frozenset({"q"}), frozenset({"e"})), False, True, True),
    ],
)
def test_scopes(scope: KeyScope, policy: bool, served: bool, named: bool) -> None:
    said = (scope.allows_policy("p"), scope.allows_expert("e"), scope.allows_naming("e"))
    assert said == (policy, served, named)


def test_bounds_have_bounds() -> None:
    KeyLimits(1, RATE_MAX, None)
    KeyBudgets(0, None, BUDGET_MAX_MICRO_USD, 1)
    with pytest.raises(ValueError, match="requests_per_minute"):
        KeyLimits(requests_per_minute=0)
    with pytest.raises(ValueError, match="tokens_per_minute"):
        KeyLimits(tokens_per_minute=RATE_MAX + 1)
    with pytest.raises(ValueError, match="day"):
        KeyBudgets(day=-1)


@pytest.mark.parametrize(
    ("ms", "written"),
    [
        (0, "0ms"),
        (20, "20ms"),
        (1_000, "1s"),
        (1_500, "1.5s"),
        (59_999, "59.999s"),
        (60_000, "1m0s"),
        (360_000, "6m0s"),
        (61_001, "1m2s"),
        (3_600_000, "1h0m0s"),
    ],
)
def test_durations_are_written_as_openai_writes_them(ms: int, written: str) -> None:
    assert written_duration(ms) == written
