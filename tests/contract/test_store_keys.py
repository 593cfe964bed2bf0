"""Keys on real servers: all limits or none, never overspent, settled once, nothing leaks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from deployments.store import StateStore
from experts.errors import (
    AuthenticationFailed,
    BudgetExceeded,
    CoeError,
    RateLimited,
    ScopeDenied,
)
from gateway.keys import (
    BUDGET_MAX_MICRO_USD,
    Admitted,
    KeyBudgets,
    KeyLimits,
    KeyScope,
    RateState,
    digest_of,
    key_secret,
)
from gateway.state.keys import (
    KeyLedger,
    KeyStore,
    KeyTaken,
    KeyUsage,
    Order,
    Refused,
    Settlement,
)

pytestmark = pytest.mark.valkey

NOW = 1_700_000_000_000
HOUR, DAY = 3_600_000, 86_400_000
LEASE = 60_000
DIGEST = digest_of(key_secret(bytes(32)))
FREE = Order(0, 0, LEASE)


async def make_key(
    store: StateStore,
    *,
    scope: KeyScope | None = None,
    limits: KeyLimits | None = None,
    budgets: KeyBudgets | None = None,
) -> KeyLedger:
    """One key under DIGEST, and its ledger."""
    await KeyStore(store).create(
        DIGEST, "test", scope or KeyScope(), limits or KeyLimits(), budgets or KeyBudgets()
    )
    return KeyLedger(store)


def order(amount: int, tokens: int = 0, lease_ms: int = LEASE) -> Order:
    return Order(amount, tokens, lease_ms)


async def refusal(
    ledger: KeyLedger, admission: str, asked: Order, now_ms: int | None = None
) -> CoeError:
    answer = await ledger.admit(DIGEST, admission, asked, now_ms)
    assert isinstance(answer, Refused), answer
    return answer.error


async def admitted(
    ledger: KeyLedger, admission: str, asked: Order, now_ms: int | None = None
) -> Admitted:
    answer = await ledger.admit(DIGEST, admission, asked, now_ms)
    assert isinstance(answer, Admitted), answer
    return answer


# --- records -------------------------------------------------------------------------------------


async def test_a_key_is_found_listed_and_revoked_for_good(store: StateStore) -> None:
    keys = KeyStore(store)
    scope = KeyScope(frozenset({"auto", "cheap"}), frozenset({"sql"}))
    created = await keys.create(
        DIGEST, "team a", scope, KeyLimits(60, None, 3), KeyBudgets(day=5_000_000)
    )
    assert await keys.find(DIGEST) == created
    assert await keys.list() == [created]
    with pytest.raises(KeyTaken):
        await keys.create(DIGEST, "again", KeyScope(), KeyLimits(), KeyBudgets())
    revoked_ms = await keys.revoke(created.id)
    assert revoked_ms is not None
    assert revoked_ms >= created.created_ms
    assert await keys.revoke(created.id) == revoked_ms
    assert await keys.find(DIGEST) == replace(created, revoked_ms=revoked_ms)
    assert await keys.revoke("key-none") is None
    assert await keys.find("0" * 64) is None


# --- verdicts ------------------------------------------------------------------------------------


async def test_unknown_and_revoked_keys_are_refused_at_once(store: StateStore) -> None:
    ledger = KeyLedger(store)
    assert isinstance(await refusal(ledger, "r", FREE), AuthenticationFailed)
    await make_key(store)
    await admitted(ledger, "r", FREE)
    await KeyStore(store).revoke((await KeyStore(store).list())[0].id)
    error = await refusal(ledger, "r2", FREE)
    assert isinstance(error, AuthenticationFailed)
    assert "revoked" in error.message


@pytest.mark.parametrize(
    ("policies", "experts", "asked", "denied"),
    [
        (None, None, {"policy": "any", "experts": ("x",)}, None),
        ({"auto"}, None, {"policy": "auto", "experts": ("x",)}, None),
        ({"auto"}, None, {"policy": "aut", "experts": ("x",)}, ("policy", "aut")),
        ({"auto"}, None, {"named": "x", "experts": ("x",)}, ("expert", "x")),
        (None, {"sql"}, {"named": "sql", "experts": ("sql",)}, None),
        ({"auto"}, {"sql"}, {"named": "sql", "experts": ("sql",)}, None),
        (None, {"sql", "math"}, {"policy": "a", "experts": ("sql", "sq")}, ("expert", "sq")),
    ],
)
async def test_scopes(
    store: StateStore,
    policies: set[str] | None,
    experts: set[str] | None,
    asked: dict[str, Any],
    denied: tuple[str, str] | None,
) -> None:
    scope = KeyScope(policies and frozenset(policies), experts and frozenset(experts))
    ledger = await make_key(store, scope=scope)
    answer = await ledger.admit(DIGEST, "r", Order(0, 0, LEASE, **asked))
    if denied is None:
        assert isinstance(answer, Admitted)
    else:
        assert isinstance(answer, Refused)
        assert isinstance(answer.error, ScopeDenied)
        assert (answer.error.kind, answer.error.name) == denied


async def test_a_refusal_by_one_limit_uses_none_of_the_others(store: StateStore) -> None:
    ledger = await make_key(
        store, limits=KeyLimits(10, 100, 2), budgets=KeyBudgets(hour=50, total=1_000)
    )
    before = await admitted(ledger, "first", order(10, 20), NOW)
    assert before.rates == {
        "requests": RateState(10, 9, 6_000),
        "tokens": RateState(100, 80, 12_000),
    }
    for number, asked in enumerate([order(41, 1), order(1, 81)]):
        await refusal(ledger, f"no-{number}", asked, NOW)
    await admitted(ledger, "second", order(40, 0), NOW)
    assert isinstance(await refusal(ledger, "third", FREE, NOW), RateLimited)
    assert await ledger.usage(DIGEST, NOW) == KeyUsage(0, 0, 0, 0, reserved=50, running=2)
    assert await ledger.settle(DIGEST, "first", 0, 0, NOW) is Settlement.SETTLED
    after = await admitted(ledger, "fourth", order(10, 0), NOW)
    assert after.rates["requests"].remaining == 7
    assert after.rates["tokens"].remaining == 100


# --- money ---------------------------------------------------------------------------------------


async def test_a_full_budget_says_what_is_left_and_when_it_opens(store: StateStore) -> None:
    ledger = await make_key(store, budgets=KeyBudgets(day=100))
    noon = NOW - NOW % DAY + DAY // 2
    await admitted(ledger, "r1", order(70), noon)
    error = await refusal(ledger, "r2", order(31), noon)
    assert isinstance(error, BudgetExceeded)
    assert (error.scope, error.needed_micro_usd, error.left_micro_usd) == ("key's day", 31, 30)
    assert error.retry_after_s == 43_200
    too_big = await refusal(ledger, "r3", order(101), noon)
    assert isinstance(too_big, BudgetExceeded)
    assert too_big.opens_in_ms is None
    assert await ledger.settle(DIGEST, "r1", 50, 0, noon) is Settlement.SETTLED
    await admitted(ledger, "r2", order(50), noon)


async def test_two_hundred_callers_on_several_connections_never_overspend(
    open_store: Callable[[], StateStore],
) -> None:
    limit, draw = 10_000, random.Random(7)
    ledgers = [KeyLedger(open_store()) for _ in range(4)]
    await make_key(open_store(), budgets=KeyBudgets(total=limit))
    jobs = [(f"r{n}", amount := draw.randint(1, 200), draw.randint(0, amount)) for n in range(200)]
    highest = 0

    async def spend(ledger: KeyLedger, job: tuple[str, int, int]) -> int:
        nonlocal highest
        name, amount, actual = job
        if isinstance(await ledger.admit(DIGEST, name, order(amount)), Refused):
            return 0
        usage = await ledger.usage(DIGEST)
        highest = max(highest, usage.total + usage.reserved)
        await ledger.settle(DIGEST, name, actual, 0)
        return actual

    paid = await asyncio.gather(*(spend(ledgers[n % 4], job) for n, job in enumerate(jobs)))
    usage = await ledgers[0].usage(DIGEST)
    assert (usage.total, usage.reserved, usage.running) == (sum(paid), 0, 0)
    assert highest <= limit
    assert sum(paid) > limit / 4, "the test never came near the limit"


async def test_settling_twice_charges_once(open_store: Callable[[], StateStore]) -> None:
    await make_key(open_store())
    ledgers = [KeyLedger(open_store()) for _ in range(2)]
    await admitted(ledgers[0], "r", order(10))
    await admitted(ledgers[1], "r", order(10))  # the same admission again is the same admission
    outcomes = await asyncio.gather(*(ledgers[n % 2].settle(DIGEST, "r", 9, 0) for n in range(20)))
    assert sorted(outcomes) == [Settlement.SETTLED, *[Settlement.UNKNOWN] * 19]
    usage = await ledgers[0].usage(DIGEST)
    assert (usage.total, usage.reserved, usage.running) == (9, 0, 0)


async def test_forgotten_requests_give_money_and_place_back_when_their_lease_ends(
    store: StateStore,
) -> None:
    ledger = await make_key(
        store, limits=KeyLimits(concurrent_requests=1), budgets=KeyBudgets(total=100)
    )
    await admitted(ledger, "forgotten", order(100, lease_ms=1_000), NOW)
    assert isinstance(await refusal(ledger, "next", order(0), NOW + 999), RateLimited)
    assert isinstance(await refusal(ledger, "next", order(1), NOW + 999), BudgetExceeded)
    assert (await ledger.usage(DIGEST, NOW + 1_000)).running == 0
    await admitted(ledger, "next", order(100), NOW + 1_000)
    assert await ledger.settle(DIGEST, "forgotten", 30, 0, NOW + 1_001) is Settlement.LATE
    assert await ledger.settle(DIGEST, "forgotten", 30, 0, NOW + 1_001) is Settlement.UNKNOWN
    assert await ledger.usage(DIGEST, NOW + 1_001) == KeyUsage(30, 30, 30, 30, 100, 1)


async def test_new_windows_start_unspent_and_keep_what_is_reserved(store: StateStore) -> None:
    ledger = await make_key(store, budgets=KeyBudgets(hour=100))
    start = NOW - NOW % HOUR
    await admitted(ledger, "done", order(80), start)
    await ledger.settle(DIGEST, "done", 80, 0, start)
    await admitted(ledger, "running", order(20, lease_ms=2 * HOUR), start + 1)
    assert (await ledger.usage(DIGEST, start + HOUR - 1)).hour == 80
    assert (await ledger.usage(DIGEST, start + HOUR)).hour == 0
    await refusal(ledger, "big", order(81), start + HOUR)
    await admitted(ledger, "fits", order(80), start + HOUR)
    await ledger.settle(DIGEST, "running", 20, 0, start + HOUR)
    assert (await ledger.usage(DIGEST, start + HOUR)).hour == 20
    lagging = await refusal(ledger, "lag", order(1), start + 5)
    assert isinstance(lagging, BudgetExceeded), "a clock set back must not empty the window"


async def test_months_are_calendar_months(store: StateStore) -> None:
    """2024-02-29 23:59:59.999 UTC, and the millisecond after; then the end of a year."""
    ledger = await make_key(store, budgets=KeyBudgets(month=10))
    leap_end, year_end = 1_709_251_199_999, 1_735_689_599_999
    await admitted(ledger, "a", order(10), leap_end - 28 * DAY)
    await ledger.settle(DIGEST, "a", 10, 0, leap_end - 28 * DAY)
    error = await refusal(ledger, "b", order(1), leap_end)
    assert isinstance(error, BudgetExceeded)
    assert error.opens_in_ms == 1
    await admitted(ledger, "b", order(10), leap_end + 1)
    await ledger.settle(DIGEST, "b", 10, 0, leap_end + 1)
    await admitted(ledger, "c", order(10), year_end)
    await ledger.settle(DIGEST, "c", 10, 0, year_end)
    await refusal(ledger, "d", order(1), year_end)
    await admitted(ledger, "d", order(10), year_end + 1)


async def test_largest_amounts_stay_exact(store: StateStore) -> None:
    ledger = await make_key(store, budgets=KeyBudgets(total=BUDGET_MAX_MICRO_USD))
    await admitted(ledger, "r", order(BUDGET_MAX_MICRO_USD - 1), NOW)
    await ledger.settle(DIGEST, "r", BUDGET_MAX_MICRO_USD - 1, 0, NOW)
    await admitted(ledger, "r2", order(1), NOW)
    await refusal(ledger, "r3", order(1), NOW)
    assert (await ledger.usage(DIGEST, NOW)).total == BUDGET_MAX_MICRO_USD - 1


# --- rates ---------------------------------------------------------------------------------------


async def test_the_request_bucket_refills_steadily(store: StateStore) -> None:
    ledger = await make_key(store, limits=KeyLimits(requests_per_minute=3))
    for n in range(3):
        await admitted(ledger, f"r{n}", FREE, NOW)
    error = await refusal(ledger, "r3", FREE, NOW)
    assert isinstance(error, RateLimited)
    assert error.retry_after_ms == 20_000
    assert isinstance(await refusal(ledger, "r3", FREE, NOW + 19_999), RateLimited)
    await admitted(ledger, "r3", FREE, NOW + 20_000)
    full = await admitted(ledger, "r4", FREE, NOW + 500_000)
    assert full.rates["requests"] == RateState(3, 2, 20_000)


async def test_tokens_are_settled_to_the_true_number(store: StateStore) -> None:
    ledger = await make_key(store, limits=KeyLimits(tokens_per_minute=600))
    await admitted(ledger, "a", order(0, 500), NOW)
    error = await refusal(ledger, "b", order(0, 200), NOW)
    assert isinstance(error, RateLimited)
    assert (error.retry_after_ms, error.left) == (10_000, 100)
    await ledger.settle(DIGEST, "a", 0, 100, NOW)
    after = await admitted(ledger, "b", order(0, 200), NOW)
    assert after.rates["tokens"].remaining == 300
    await ledger.settle(DIGEST, "b", 0, 900, NOW)  # more than estimated is owed
    owed = await refusal(ledger, "c", order(0, 1), NOW)
    assert isinstance(owed, RateLimited)
    assert owed.retry_after_ms == 40_100
    never = await refusal(ledger, "d", order(0, 601), NOW)
    assert isinstance(never, RateLimited)
    assert never.retry_after_ms is None


async def test_concurrency_holds_over_several_gateways(
    open_store: Callable[[], StateStore],
) -> None:
    await make_key(open_store(), limits=KeyLimits(concurrent_requests=5))
    ledgers = [KeyLedger(open_store()) for _ in range(4)]
    answers = await asyncio.gather(
        *(ledgers[n % 4].admit(DIGEST, f"r{n}", FREE) for n in range(40))
    )
    assert sum(isinstance(answer, Admitted) for answer in answers) == 5
    refused = [a.error for a in answers if isinstance(a, Refused)]
    assert all(isinstance(error, RateLimited) for error in refused)


@pytest.mark.parametrize(
    "bad",
    [
        {"amount_micro_usd": -1},
        {"amount_micro_usd": BUDGET_MAX_MICRO_USD + 1},
        {"tokens": -1},
        {"lease_ms": 0},
    ],
)
def test_senseless_orders_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        Order(**{"amount_micro_usd": 1, "tokens": 1, "lease_ms": 1, **bad})
