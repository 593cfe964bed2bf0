"""The budget ledger on real servers: never overspent, settled once, nothing leaks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from deployments.store import StateStore
from experts.errors import BudgetExceeded
from gateway.state.budgets import AMOUNT_MAX_MICRO_USD, Balance, BudgetLedger, Settlement

pytestmark = pytest.mark.valkey

NOW = 1_700_000_000_000
LEASE = 60_000
HOUR = 3_600_000


async def test_reserve_settle_and_what_is_left(store: StateStore) -> None:
    ledger = BudgetLedger(store)
    await ledger.reserve("k", 70, 100, "r1", LEASE, NOW)
    with pytest.raises(BudgetExceeded) as refusal:
        await ledger.reserve("k", 31, 100, "r2", LEASE, NOW)
    assert (refusal.value.needed_micro_usd, refusal.value.left_micro_usd) == (31, 30)
    assert await ledger.settle("k", "r1", 50) is Settlement.SETTLED
    await ledger.reserve("k", 50, 100, "r2", LEASE, NOW)
    assert await ledger.balance("k", NOW) == Balance(spent=50, reserved=50)


async def test_two_hundred_callers_on_several_connections_never_overspend(
    open_store: Callable[[], StateStore],
) -> None:
    ledgers = [BudgetLedger(open_store()) for _ in range(4)]
    limit, draw = 10_000, random.Random(7)
    jobs = [(f"r{n}", amount := draw.randint(1, 200), draw.randint(0, amount)) for n in range(200)]
    highest = 0

    async def spend(ledger: BudgetLedger, job: tuple[str, int, int]) -> int:
        nonlocal highest
        name, amount, actual = job
        try:
            await ledger.reserve("team", amount, limit, name, LEASE)
        except BudgetExceeded:
            return 0
        balance = await ledger.balance("team")
        highest = max(highest, balance.spent + balance.reserved)
        await ledger.settle("team", name, actual)
        return actual

    paid = await asyncio.gather(*(spend(ledgers[n % 4], job) for n, job in enumerate(jobs)))
    assert await ledgers[0].balance("team") == Balance(spent=sum(paid), reserved=0)
    assert highest <= limit
    assert sum(paid) > limit / 4, "the test never came near the limit"


async def test_full_budget_admits_exactly_what_fits(open_store: Callable[[], StateStore]) -> None:
    ledgers = [BudgetLedger(open_store()) for _ in range(4)]
    outcomes = await asyncio.gather(
        *(ledgers[n % 4].reserve("k", 7, 100, f"r{n}", LEASE) for n in range(200)),
        return_exceptions=True,
    )
    assert sum(outcome is None for outcome in outcomes) == 14
    assert all(outcome is None or isinstance(outcome, BudgetExceeded) for outcome in outcomes)
    assert (await ledgers[0].balance("k")).reserved == 98


async def test_settling_twice_charges_once(open_store: Callable[[], StateStore]) -> None:
    ledgers = [BudgetLedger(open_store()) for _ in range(2)]
    await ledgers[0].reserve("k", 10, 100, "r", LEASE, NOW)
    outcomes = await asyncio.gather(*(ledgers[n % 2].settle("k", "r", 9) for n in range(20)))
    assert sorted(outcomes) == [Settlement.SETTLED, *[Settlement.UNKNOWN] * 19]
    assert await ledgers[0].balance("k", NOW) == Balance(spent=9, reserved=0)


async def test_reserving_again_replaces_the_amount(store: StateStore) -> None:
    ledger = BudgetLedger(store)
    await ledger.reserve("k", 60, 100, "r", LEASE, NOW)
    await ledger.reserve("k", 60, 100, "r", LEASE, NOW)
    await ledger.reserve("k", 90, 100, "r", LEASE, NOW)
    assert await ledger.balance("k", NOW) == Balance(spent=0, reserved=90)
    with pytest.raises(BudgetExceeded):
        await ledger.reserve("k", 101, 100, "r", LEASE, NOW)
    assert await ledger.balance("k", NOW) == Balance(spent=0, reserved=90)


async def test_forgotten_reservation_is_released_when_its_lease_ends(store: StateStore) -> None:
    ledger = BudgetLedger(store)
    await ledger.reserve("k", 100, 100, "forgotten", 1_000, NOW)
    with pytest.raises(BudgetExceeded):
        await ledger.reserve("k", 100, 100, "next", LEASE, NOW + 999)
    await ledger.reserve("k", 100, 100, "next", LEASE, NOW + 1_000)
    assert await ledger.balance("k", NOW + 1_000) == Balance(spent=0, reserved=100)


async def test_renewed_lease_does_not_end(store: StateStore) -> None:
    ledger = BudgetLedger(store)
    await ledger.reserve("k", 100, 100, "long", 1_000, NOW)
    await ledger.reserve("k", 100, 100, "long", 1_000, NOW + 900)
    with pytest.raises(BudgetExceeded):
        await ledger.reserve("k", 1, 100, "next", LEASE, NOW + 1_500)


async def test_late_settlement_is_charged_once(store: StateStore) -> None:
    ledger = BudgetLedger(store)
    await ledger.reserve("k", 40, 100, "slow", 1_000, NOW)
    await ledger.reserve("k", 1, 100, "other", LEASE, NOW + 2_000)
    assert await ledger.settle("k", "slow", 30) is Settlement.LATE
    assert await ledger.settle("k", "slow", 30) is Settlement.UNKNOWN
    assert await ledger.balance("k", NOW + 2_000) == Balance(spent=30, reserved=1)


async def test_new_window_starts_unspent_and_keeps_what_is_reserved(store: StateStore) -> None:
    ledger = BudgetLedger(store)
    start = NOW - NOW % HOUR
    await ledger.reserve("k", 80, 100, "done", LEASE, start, window_ms=HOUR)
    await ledger.settle("k", "done", 80)
    await ledger.reserve("k", 20, 100, "running", 2 * HOUR, start + 1, window_ms=HOUR)
    assert await ledger.spent("k", start + HOUR - 1) == 80
    assert await ledger.spent("k", start + HOUR) == 0
    with pytest.raises(BudgetExceeded):
        await ledger.reserve("k", 81, 100, "big", LEASE, start + HOUR, window_ms=HOUR)
    await ledger.reserve("k", 80, 100, "fits", LEASE, start + HOUR, window_ms=HOUR)


async def test_clock_that_lags_does_not_empty_the_window(store: StateStore) -> None:
    ledger = BudgetLedger(store)
    start = NOW - NOW % HOUR
    await ledger.reserve("k", 100, 100, "r", LEASE, start, window_ms=HOUR)
    await ledger.settle("k", "r", 100)
    with pytest.raises(BudgetExceeded):
        await ledger.reserve("k", 1, 100, "lag", LEASE, start - 5, window_ms=HOUR)
    assert await ledger.spent("k", start - 5) == 100


async def test_idle_windowed_budget_expires_and_a_lasting_one_does_not(store: StateStore) -> None:
    ledger = BudgetLedger(store)
    with pytest.raises(BudgetExceeded):
        await ledger.reserve("refused", 2, 1, "r", LEASE, window_ms=HOUR)
    assert await store.command("PTTL", store.key("budget", "{refused}", "totals")) > 0
    await ledger.reserve("windowed", 1, 1, "r", LEASE, window_ms=HOUR)
    await ledger.reserve("lasting", 1, 1, "r", LEASE)
    for part in ("totals", "amounts", "leases"):
        assert await store.command("PTTL", store.key("budget", "{windowed}", part)) > 0
        assert await store.command("PTTL", store.key("budget", "{lasting}", part)) == -1


async def test_largest_amounts_stay_exact(store: StateStore) -> None:
    ledger = BudgetLedger(store)
    await ledger.reserve("k", AMOUNT_MAX_MICRO_USD - 1, AMOUNT_MAX_MICRO_USD, "r", LEASE, NOW)
    await ledger.settle("k", "r", AMOUNT_MAX_MICRO_USD - 1)
    await ledger.reserve("k", 1, AMOUNT_MAX_MICRO_USD, "r2", LEASE, NOW)
    with pytest.raises(BudgetExceeded):
        await ledger.reserve("k", 1, AMOUNT_MAX_MICRO_USD, "r3", LEASE, NOW)
    assert await ledger.spent("k", NOW) == AMOUNT_MAX_MICRO_USD - 1


@pytest.mark.parametrize(
    "bad",
    [
        {"amount": -1},
        {"limit": AMOUNT_MAX_MICRO_USD + 1},
        {"lease_ms": 0},
        {"scope": ""},
        {"scope": "x" * 300},
    ],
)
async def test_senseless_arguments_are_refused(store: StateStore, bad: dict[str, int]) -> None:
    good = {"scope": "k", "amount": 1, "limit": 1, "reservation_id": "r", "lease_ms": 1}
    with pytest.raises(ValueError):
        await BudgetLedger(store).reserve(**{**good, **bad})  # type: ignore[arg-type]
