"""Breakers in a real store: script and Python keep the same rules, gateways see the same."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from deployments.store import StateStore, load_script
from gateway.breakers import Breaker, BreakerRules, BreakerState, Calls, Probe
from gateway.state.breakers import BreakerBoard, Passage
from tests.contract.gateway_kit import eventually

pytestmark = pytest.mark.valkey

RULES = BreakerRules(
    failures_in_a_row=4, calls_min=8, window_ms=1_000, open_ms=200, open_max_ms=700
)
LONG_OPEN = replace(RULES, open_ms=60_000, open_max_ms=60_000)
BAD, GOOD = "expert:bad", "expert:good"


class Script:
    """The two scripts, called directly, with a clock of the test's."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._keys = [store.key("{breakers}", part) for part in ("state", "tripped")]
        common = load_script("gateway.state", "breaker_common.lua")
        for name in ("sync", "probe"):
            text = load_script("gateway.state", f"breaker_{name}.lua")
            store.add_script(f"breaker_{name}", common + text)

    async def sync(self, now_ms: int, *report: Any) -> dict[bytes, tuple[int, ...]]:
        rules = RULES
        reply = await self._store.eval_script(
            "breaker_sync",
            self._keys,
            [
                now_ms,
                rules.failures_in_a_row,
                rules.failure_share,
                rules.calls_min,
                rules.slot_ms,
                rules.open_ms,
                rules.open_max_ms,
                *report,
            ],
        )
        return {reply[i]: tuple(reply[i + 1 : i + 5]) for i in range(0, len(reply), 5)}

    async def claim(self, now_ms: int, target: str) -> int:
        args = [now_ms, target, RULES.probe_lease_ms]
        answer: int = await self._store.eval_script("breaker_probe", self._keys, args)
        return answer


def as_told(breaker: Breaker, now_ms: int) -> tuple[int, ...]:
    left = max(0, breaker.open_until_ms - now_ms) if breaker.open_until_ms else -1
    return breaker.in_a_row, left, breaker.backoff_ms, max(0, breaker.probe_until_ms - now_ms)


@pytest.mark.parametrize("seed", range(6))
async def test_the_script_and_the_pure_breaker_agree_on_any_history(
    store: StateStore, seed: int
) -> None:
    dice, script, breaker, now_ms = random.Random(seed), Script(store), Breaker(), 1_000_000
    seen: set[BreakerState] = set()
    for _ in range(150):
        now_ms += dice.choice((0, 5, 40, 150, 400))
        match dice.choice(("calls", "calls", "calls", "probe", "claim")):
            case "calls":
                ok, failed = dice.choice(((1, 0), (0, 1), (3, 1), (1, 3), (0, 2)))
                last = dice.randint(0, failed) if ok else failed
                breaker.record(RULES, Calls(ok, failed, last), now_ms)
                told = await script.sync(now_ms, BAD, "calls", ok, failed, last)
            case "probe":
                outcome = dice.choice(tuple(Probe))
                breaker.probed(RULES, outcome, now_ms)
                numbers = int(outcome is Probe.OK), int(outcome is Probe.FAILED)
                told = await script.sync(now_ms, BAD, "probe", *numbers, 0)
            case _:
                closed = breaker.state(now_ms) is BreakerState.CLOSED
                wait_ms = breaker.wait_ms(now_ms)
                granted = breaker.claim(RULES, now_ms)
                assert await script.claim(now_ms, BAD) == (
                    -1 if closed else 0 if granted else wait_ms
                )
                told = await script.sync(now_ms, BAD, "calls", 0, 0, 0) if closed else {}
                if closed:
                    breaker.record(RULES, Calls(), now_ms)
        if told:
            assert told[BAD.encode()] == as_told(breaker, now_ms)
        seen.add(breaker.state(now_ms))
    assert seen == set(BreakerState)


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_failures_seen_by_several_gateways_add_up_and_all_of_them_stop(
    open_store: Callable[[], StateStore],
) -> None:
    boards = [BreakerBoard(open_store(), rules=LONG_OPEN) for _ in range(3)]
    for board in boards[:2]:
        for _ in range(2):
            board.note_failure(BAD)
        board.note_ok(GOOD)
        await board.sync()
    assert boards[0].wait_ms(BAD) == 0, "it has not asked since"
    for board in boards:
        await board.sync()
        assert board.wait_ms(BAD) > 0
        assert board.wait_ms(GOOD) == 0
        assert await board.enter((GOOD, BAD)) == BAD


async def test_of_all_gateways_one_probes_and_its_success_lets_everybody_in(
    open_store: Callable[[], StateStore],
) -> None:
    clock = Time()
    boards = [BreakerBoard(open_store(), rules=RULES, now_ms=clock) for _ in range(3)]
    for _ in range(RULES.failures_in_a_row):
        boards[0].note_failure(BAD)
    for board in boards:
        await board.sync()
    await asyncio.sleep(RULES.open_ms / 1000 + 0.05)  # the store's own clock has to pass
    clock.now += RULES.open_ms + 50
    asked = await asyncio.gather(*(b.enter((BAD,)) for b in boards for _ in range(20)))
    leave = [passage for passage in asked if isinstance(passage, Passage)]
    assert len(leave) == 1
    leave[0].succeeded()
    for board in (*boards, *boards):
        await board.sync()
    assert all(board.wait_ms(BAD) == 0 for board in boards)
    assert all([isinstance(await b.enter((BAD,)), Passage) for b in boards])


async def test_a_probe_that_was_given_up_leaves_its_place_to_the_next(store: StateStore) -> None:
    clock = Time()
    board = BreakerBoard(store, rules=RULES, now_ms=clock)
    for _ in range(RULES.failures_in_a_row):
        board.note_failure(BAD)
    await board.sync()
    await asyncio.sleep(RULES.open_ms / 1000 + 0.05)  # the store's own clock has to pass
    clock.now += RULES.open_ms + 50
    first = await board.enter((BAD,))
    assert isinstance(first, Passage)
    assert await board.enter((BAD,)) == BAD
    first.abandoned()
    await board.sync()
    second = await board.enter((BAD,))
    assert isinstance(second, Passage)
    second.failed((BAD,))
    await board.sync()
    assert board.wait_ms(BAD) > RULES.open_ms, "twice the back-off after a failed probe"


async def test_what_tripped_while_the_store_was_away_is_told_when_it_is_back(
    plain_server: Any, namespace: str
) -> None:
    lone, other = (
        StateStore(plain_server.url, timeout_ms=5_000, namespace=namespace) for _ in range(2)
    )
    rules = BreakerRules(open_ms=60_000)
    board = BreakerBoard(lone, rules=rules, sync_ms=20)
    board.start()
    plain_server.kill()
    await eventually(lambda: not lone.available)
    for _ in range(rules.failures_in_a_row):
        board.note_failure(BAD)
    assert await board.enter((BAD,)) == BAD, "by itself, and at once"
    plain_server.start()
    watching = BreakerBoard(other, rules=rules)
    async with asyncio.timeout(30):
        while not watching.wait_ms(BAD):
            await watching.sync()
            await asyncio.sleep(0.02)
    assert board.wait_ms(BAD) > 0
    await board.aclose()
    for store in (lone, other):
        await store.aclose()
