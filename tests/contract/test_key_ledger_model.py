"""The ledger's scripts against a plain model of what they promise, over any sequence of events."""

from __future__ import annotations

import asyncio
import datetime
import secrets
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.embedded_valkey import EmbeddedValkey
from deployments.store import StateStore
from experts.errors import BudgetExceeded, RateLimited
from gateway.keys import Admitted, KeyBudgets, KeyLimits, KeyScope
from gateway.state.keys import KeyLedger, KeyStore, Order, Settlement

pytestmark = pytest.mark.valkey

START = 1_709_251_190_000  # ten seconds before the end of February 2024, UTC
REMEMBERED_MS = 3_600_000  # so long after its lease a late settlement still counts
IDS = [f"r{n}" for n in range(6)]


@dataclass
class Model:
    """One key, in whole numbers; buckets in sixty-thousandths."""

    limits: KeyLimits
    budgets: KeyBudgets
    spent: dict[str, dict[str, int]] = field(default_factory=dict)  # window -> its start -> money
    held: dict[str, tuple[int, int, int]] = field(default_factory=dict)  # money, tokens, lease end
    expired: dict[str, int] = field(default_factory=dict)  # when it was released
    levels: dict[str, tuple[int, int]] = field(default_factory=dict)  # level, at

    def admit(self, name: str, order: Order, now_ms: int) -> type | None:
        """None when admitted, else the class of the refusal."""
        for late in [n for n, (_, _, ends) in self.held.items() if ends <= now_ms]:
            del self.held[late]
            self.expired[late] = now_ms
        self.expired = {n: at for n, at in self.expired.items() if at > now_ms - REMEMBERED_MS}
        if name in self.held:
            return None
        reserved = sum(money for money, _, _ in self.held.values())
        for window, limit in self.budgets.by_name().items():
            if limit is not None:
                spent = self.spent_in(window, now_ms)
                if order.amount_micro_usd > limit - spent - reserved:
                    return BudgetExceeded
        at_once = self.limits.concurrent_requests
        if at_once is not None and len(self.held) >= at_once:
            return RateLimited
        wanted = {"requests": 60_000, "tokens": order.tokens * 60_000}
        levels = {b: self.level(b, now_ms) for b in wanted if self.limit_of(b) is not None}
        if any(levels[bucket] < wanted[bucket] for bucket in levels):
            return RateLimited
        for bucket, level in levels.items():
            self.levels[bucket] = (level - wanted[bucket], now_ms)
        self.held[name] = (order.amount_micro_usd, order.tokens, now_ms + order.lease_ms)
        self.expired.pop(name, None)
        return None

    def settle(self, name: str, spent: int, tokens: int, now_ms: int) -> Settlement:
        if name not in self.held:
            if name not in self.expired:
                return Settlement.UNKNOWN
            del self.expired[name]
            self._charge(spent, now_ms)
            return Settlement.LATE
        _, estimated, _ = self.held.pop(name)
        self._charge(spent, now_ms)
        limit = self.limits.tokens_per_minute
        if limit is not None:
            level = self.level("tokens", now_ms) + (estimated - tokens) * 60_000
            self.levels["tokens"] = (min(limit * 60_000, level), now_ms)
        return Settlement.SETTLED

    def spent_in(self, window: str, now_ms: int) -> int:
        return self.spent.get(window, {}).get(_label(window, now_ms), 0)

    def level(self, bucket: str, now_ms: int) -> int:
        limit = self.limit_of(bucket) or 0
        level, at = self.levels.get(bucket, (limit * 60_000, now_ms))
        return min(limit * 60_000, level + (now_ms - at) * limit)

    def limit_of(self, bucket: str) -> int | None:
        return self.limits.by_name()[f"{bucket}_per_minute"]

    def _charge(self, spent: int, now_ms: int) -> None:
        for window in self.budgets.by_name():
            in_window = self.spent.setdefault(window, {})
            label = _label(window, now_ms)
            in_window[label] = in_window.get(label, 0) + spent


def _label(window: str, now_ms: int) -> str:
    """A name of the window that holds the moment, by the calendar of the standard library."""
    formats = {"hour": "%Y-%m-%d %H", "day": "%Y-%m-%d", "month": "%Y-%m", "total": ""}
    moment = datetime.datetime.fromtimestamp(now_ms / 1000, datetime.UTC)
    return moment.strftime(formats[window])


def maybe(low: int, high: int) -> st.SearchStrategy[int | None]:
    return st.none() | st.integers(low, high)


LIMITS = st.builds(KeyLimits, maybe(1, 4), maybe(1, 60), maybe(1, 3))
BUDGETS = st.builds(KeyBudgets, maybe(0, 60), maybe(0, 90), maybe(0, 120), maybe(0, 200))
ADMIT = st.tuples(
    st.just("admit"),
    st.sampled_from(IDS),
    st.builds(Order, st.integers(0, 40), st.integers(0, 40), st.sampled_from([1_000, 90_000])),
)
SETTLE = st.tuples(
    st.just("settle"), st.sampled_from(IDS), st.tuples(st.integers(0, 40), st.integers(0, 50))
)
WAIT = st.tuples(
    st.just("wait"), st.just(""), st.sampled_from([1, 999, 5_000, 20_000, 3_600_000, 90_000_000])
)
EVENTS = st.lists(ADMIT | SETTLE | WAIT, min_size=5, max_size=40)


async def follow(url: str, limits: KeyLimits, budgets: KeyBudgets, events: list[Any]) -> None:
    store = StateStore(url, timeout_ms=5_000, namespace=f"coe-test-{secrets.token_hex(6)}")
    digest = secrets.token_hex(32)
    await KeyStore(store).create(digest, "model", KeyScope(), limits, budgets)
    ledger, model, now_ms = KeyLedger(store), Model(limits, budgets), START
    honest = True  # nobody has settled more than was reserved, or after the lease
    for kind, name, what in events:
        if kind == "wait":
            now_ms += what
        elif kind == "admit":
            answer = await ledger.admit(digest, name, what, now_ms)
            expected = model.admit(name, what, now_ms)
            assert expected is (None if isinstance(answer, Admitted) else type(answer.error))
        else:
            money, tokens = what
            honest &= name not in model.expired and money <= model.held.get(name, (money,))[0]
            outcome = model.settle(name, money, tokens, now_ms)
            assert await ledger.settle(digest, name, money, tokens, now_ms) is outcome
        usage = await ledger.usage(digest, now_ms)
        live = [(m, ends) for m, _, ends in model.held.values() if ends > now_ms]
        assert (usage.reserved, usage.running) == (sum(m for m, _ in live), len(live))
        for window, limit in budgets.by_name().items():
            assert getattr(usage, window) == model.spent_in(window, now_ms)
            if honest and limit is not None:
                assert getattr(usage, window) + usage.reserved <= limit
    for key in await store.command("KEYS", store.key("*")):
        await store.command("DEL", key)
    await store.aclose()


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(limits=LIMITS, budgets=BUDGETS, events=EVENTS)
def test_the_scripts_do_what_the_model_says(
    embedded_server: EmbeddedValkey, limits: KeyLimits, budgets: KeyBudgets, events: list[Any]
) -> None:
    asyncio.run(follow(embedded_server.url, limits, budgets, events))
