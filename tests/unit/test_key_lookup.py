"""RecentKeys: what is remembered, for how long, and what never is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experts.errors import StateUnavailable
from gateway import key_lookup
from gateway.key_lookup import TTL_MS, RecentKeys
from gateway.keys import KeyBudgets, KeyLimits, KeyRecord, KeyScope


def record(digest: str) -> KeyRecord:
    return KeyRecord("key-1", digest, "n", 0, None, KeyScope(), KeyLimits(), KeyBudgets())


class Store:
    def __init__(self, *digests: str) -> None:
        self.records = {digest: record(digest) for digest in digests}
        self.asked: list[str] = []
        self.away = False
        self.now_ms = 0.0

    async def find(self, digest: str) -> KeyRecord | None:
        self.asked.append(digest)
        if self.away:
            raise StateUnavailable("hgetall")
        return self.records.get(digest)

    def revoke(self, digest: str) -> None:
        self.records[digest] = replace(self.records[digest], revoked_ms=1)


@pytest.fixture
def store() -> Store:
    return Store("a", "b", "c")


@pytest.fixture
def keys(store: Store) -> RecentKeys:
    return RecentKeys(store, lambda: store.now_ms)


async def test_a_key_is_asked_for_once_a_second(store: Store, keys: RecentKeys) -> None:
    for _ in range(5):
        assert await keys.find("a") == record("a")
    store.now_ms += TTL_MS
    await keys.find("a")
    assert store.asked == ["a", "a"]


async def test_a_revoked_key_is_known_within_a_second_and_never_kept(
    store: Store, keys: RecentKeys
) -> None:
    await keys.find("a")
    store.revoke("a")
    store.now_ms += TTL_MS
    for _ in range(2):
        found = await keys.find("a")
        assert found is not None
        assert found.revoked_ms == 1
    assert store.asked == ["a"] * 3


async def test_a_new_key_works_at_once(store: Store, keys: RecentKeys) -> None:
    assert await keys.find("new") is None
    store.records["new"] = record("new")
    assert await keys.find("new") == record("new")


async def test_an_outage_is_not_remembered(store: Store, keys: RecentKeys) -> None:
    store.away = True
    with pytest.raises(StateUnavailable):
        await keys.find("a")
    store.away = False
    assert await keys.find("a") == record("a")


async def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_lookup, "KEYS_MAX", 2)
    store = Store("a", "b", "c")
    keys = RecentKeys(store, lambda: store.now_ms)
    for digest in "abc":
        await keys.find(digest)
    store.asked.clear()
    for digest in "cba":
        await keys.find(digest)
    assert store.asked == ["a"]
