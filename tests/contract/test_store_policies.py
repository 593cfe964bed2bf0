"""Policy versions in a real store: nobody's change is lost, everybody learns of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest

from deployments.store import StateStore
from experts.errors import InvalidRequest, RevisionChanged, StateUnavailable
from gateway.policy_versions import PolicyRecord, Version, activated, rolled_back
from gateway.state import policies as module
from gateway.state.policies import PolicyFollower, PolicyStore
from policies.policy_set import Override
from tests.contract.conftest import PlainServer
from tests.contract.gateway_kit import eventually

pytestmark = pytest.mark.valkey


def adding(n: int) -> Callable[[PolicyRecord], PolicyRecord]:
    return lambda record: activated(record, Version(f"d{n}", f"text {n}", n), n)


async def test_changes_at_once_are_all_made_one_after_the_other(
    open_store: Callable[[], StateStore],
) -> None:
    stores = [PolicyStore(open_store()) for _ in range(4)]
    await asyncio.gather(*(s.change("auto", adding(n)) for n, s in enumerate(stores)))
    record = await stores[0].get("auto")
    assert record.revision == 4
    assert {v.digest for v in record.versions} == {"d0", "d1", "d2", "d3"}
    assert len(record.history) == 4


async def test_a_change_of_what_is_outdated_is_refused(store: StateStore) -> None:
    policies = PolicyStore(store)
    await policies.change("auto", adding(1), revision=0)
    with pytest.raises(RevisionChanged):
        await policies.change("auto", adding(2), revision=0)
    with pytest.raises(InvalidRequest):
        await policies.change("other", rolled_back)
    assert (await policies.get("auto")).active == "d1"


async def test_the_number_of_policies_is_bounded(
    store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLICIES_MAX", 2)
    policies = PolicyStore(store)
    for name in ("a", "b"):
        await policies.change(name, adding(1))
    with pytest.raises(InvalidRequest, match="2 policies already"):
        await policies.change("c", adding(1))
    await policies.change("a", adding(2))


async def test_a_follower_is_told_of_each_change_once(store: StateStore) -> None:
    policies, told = PolicyStore(store), list[Mapping[str, Override]]()
    follower = PolicyFollower(policies, told.append, every_ms=5)
    await follower.start()
    await policies.change("auto", adding(1))
    await eventually(lambda: len(told) == 2)  # what was there at the start, and this
    await policies.change("auto", rolled_back)
    await eventually(lambda: len(told) == 3)
    await follower.aclose()
    assert [t.get("auto") for t in told] == [None, Override("text 1"), Override()]


async def test_without_the_store_the_last_known_stays_and_a_change_is_refused(
    plain_server: PlainServer,
) -> None:
    store = StateStore(plain_server.url, timeout_ms=2_000)
    policies, told = PolicyStore(store), list[Mapping[str, Override]]()
    await policies.change("auto", adding(1))
    follower = PolicyFollower(policies, told.append, every_ms=5)
    await follower.start()
    plain_server.kill()
    with pytest.raises(StateUnavailable):
        await policies.change("auto", adding(2))
    await follower.aclose()
    await store.aclose()
    assert told == [{"auto": Override("text 1")}]
