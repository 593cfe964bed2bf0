"""The gate without a store: what it asks for, what it does when it is cancelled or left alone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from experts.errors import AuthenticationFailed, RateLimited, StateUnavailable
from experts.types import Endpoint, Usage
from gateway.access import AccessControl, worst_case_order
from gateway.journal import Decision, Journal, StageNote
from gateway.keys import Access, Admitted, KeyRecord, RateState, digest_of, key_secret
from gateway.state.keys import KeyLedger, Order, Refused, Settlement
from gateway.wire import WireRequest, parse_request
from policies.types import AcceptanceRule, Calibration, Caps, Plan, Stage, StreamWindow

SECRET = key_secret(bytes(32))
KEY = KeyRecord("key-1", digest_of(SECRET), "k", 0)
REQUEST: WireRequest = parse_request(
    b'{"model": "auto", "n": 2, "messages": [{"role": "user", "content": "x"}]}', Endpoint.CHAT
)
AWAY = StateUnavailable("test")


@dataclass
class Ledger:
    """Answers as told; ``settled`` lists what was charged, ``orders`` what was asked."""

    answer: Any = field(default_factory=Admitted)
    away: bool = False
    hold: asyncio.Event | None = None
    orders: list[Order] = field(default_factory=list)
    settled: list[tuple[str, int, int]] = field(default_factory=list)

    async def admit(self, digest: str, admission_id: str, order: Order) -> Any:
        self.orders.append(order)
        if self.hold is not None:
            await self.hold.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    async def settle(self, digest: str, name: str, spent: int, tokens: int) -> Settlement:
        if self.away:
            raise AWAY
        self.settled.append((name, spent, tokens))
        return Settlement.SETTLED


class Lookup:
    def __init__(self, record: KeyRecord | None = KEY, error: Exception | None = None) -> None:
        self.asked = 0
        self._record, self._error = record, error

    async def find(self, digest: str) -> KeyRecord | None:
        self.asked += 1
        if self._error is not None:
            raise self._error
        return self._record


def gate(ledger: Ledger, lookup: Lookup | None = None, *, required: bool = True) -> AccessControl:
    return AccessControl(
        lookup or Lookup(),
        cast(KeyLedger, ledger),
        require_keys=required,
        request_timeout_ms=50_000,
    )


def decision(*, fail_open: bool = False) -> Decision:
    plan = Plan(
        policy="p",
        policy_digest="d",
        category="general",
        stages=(Stage("a", AcceptanceRule(0.5, Calibration(1.0, 0.0))), Stage("b")),
        caps=Caps(2, 1_000, 60_000.0),
        window=StreamWindow(1, 1.0),
        stage_costs_micro_usd=(3, 4),
    )
    return Decision(plan, (), None, (), {}, 10, 5, asked_policy="p", limits_fail_open=fail_open)


def journal() -> Journal:
    made = Journal("req", "dec", "chat/completions", 0.0, 0, access=Access(KEY))
    made.stages.append(StageNote("a", 0.0, usage=Usage(11, 2), cost_micro_usd=6))
    return made


def test_the_order_is_the_plan_s_worst_case() -> None:
    order = worst_case_order(REQUEST, decision(), request_timeout_ms=50_000)
    assert order == Order(
        amount_micro_usd=7,
        tokens=2 * (10 + 2 * 5),
        lease_ms=90_000,
        policy="p",
        experts=("a", "b"),
    )
    short = worst_case_order(REQUEST, decision(), request_timeout_ms=1_000)
    assert short.lease_ms == 32_000


async def test_only_what_could_be_a_key_is_looked_up() -> None:
    lookup = Lookup()
    open_gate = gate(Ledger(), lookup, required=False)
    assert await open_gate.authenticate(None) == await open_gate.authenticate("unused") == Access()
    assert lookup.asked == 0
    assert (await open_gate.authenticate(SECRET)).key is KEY
    strict = gate(Ledger(), lookup)
    for secret in (None, "unused"):
        with pytest.raises(AuthenticationFailed):
            await strict.authenticate(secret)
    away = gate(Ledger(), Lookup(error=AWAY))
    assert await away.authenticate(SECRET) == Access(unverified=True)


async def test_settled_once_however_often_it_is_asked_for() -> None:
    ledger = Ledger(Admitted({"requests": RateState(5, 4, 100)}))
    access, one = gate(ledger), journal()
    await access.admit(one, REQUEST, decision())
    assert one.rates["requests"].remaining == 4
    await access.settle(one)
    await access.settle(one)
    access.close(one)
    await access.aclose()
    assert ledger.settled == [("dec", 6, 13)]


async def test_a_refused_request_is_not_settled() -> None:
    ledger = Ledger(Refused(RateLimited("requests per minute", 5.0), {}))
    access, one = gate(ledger), journal()
    with pytest.raises(RateLimited):
        await access.admit(one, REQUEST, decision())
    access.close(one)
    await access.aclose()
    assert ledger.settled == []


async def test_who_leaves_while_being_admitted_is_settled_after_the_admission() -> None:
    ledger = Ledger(hold=asyncio.Event())
    access, one = gate(ledger), journal()
    asking = asyncio.ensure_future(access.admit(one, REQUEST, decision()))
    await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    access.close(one)
    await asyncio.sleep(0)
    assert ledger.settled == [], "it must not overtake its admission"
    assert ledger.hold is not None
    ledger.hold.set()
    await access.aclose()
    assert ledger.settled == [("dec", 6, 13)]


@pytest.mark.parametrize("fail_open", [False, True])
async def test_an_outage_at_admission(fail_open: bool) -> None:
    access, one = gate(Ledger(AWAY)), journal()
    if fail_open:
        await access.admit(one, REQUEST, decision(fail_open=True))
    else:
        with pytest.raises(StateUnavailable):
            await access.admit(one, REQUEST, decision())
    access.close(one)
    await access.aclose()


async def test_an_outage_at_settlement_is_waited_out_in_order() -> None:
    ledger = Ledger(away=True)
    access = gate(ledger)
    for name in ("one", "two"):
        one = journal()
        one.decision_id = name
        await access.admit(one, REQUEST, decision())
        await access.settle(one)
    assert ledger.settled == []
    ledger.away = False
    await access.aclose()
    assert [name for name, _, _ in ledger.settled] == ["one", "two"]


async def test_what_cannot_be_written_at_the_end_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    access, one = gate(Ledger(away=True)), journal()
    await access.admit(one, REQUEST, decision())
    await access.settle(one)
    await access.aclose()
    assert "1 settlements (6 micro-USD) were not written" in caplog.text


async def test_a_burst_waits_its_turn_before_the_store_s_patience_starts() -> None:
    """Given all at once, the last ones would time out and the store would count as away."""
    inside, highest = 0, 0

    class Busy(Ledger, Lookup):
        async def _work(self) -> None:
            nonlocal inside, highest
            inside += 1
            highest = max(highest, inside)
            for _ in range(3):
                await asyncio.sleep(0)
            inside -= 1

        async def find(self, digest: str) -> KeyRecord | None:
            await self._work()
            return KEY

        async def admit(self, digest: str, admission_id: str, order: Order) -> Any:
            await self._work()
            return await super().admit(digest, admission_id, order)

        async def settle(self, digest: str, name: str, spent: int, tokens: int) -> Settlement:
            await self._work()
            return await super().settle(digest, name, spent, tokens)

    busy = Busy()
    access = gate(busy, cast(Lookup, busy))

    async def one() -> None:
        made = journal()
        made.access = await access.authenticate(SECRET)
        await access.admit(made, REQUEST, decision())
        await access.settle(made)

    await asyncio.gather(*(one() for _ in range(300)))
    assert len(busy.settled) == 300
    assert 1 < highest <= 32
