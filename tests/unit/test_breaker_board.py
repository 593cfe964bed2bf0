"""A probe's place is given back whatever happens to its request or to the store."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from experts.errors import StateUnavailable
from gateway.breakers import BreakerRules
from gateway.state.breakers import BreakerBoard, Passage

BAD = "expert:bad"
RULES = BreakerRules(failures_in_a_row=1, open_ms=100, probe_lease_ms=30_000)


@dataclass
class Store:
    """Grants every probe, or never answers, or is away; keeps what was reported."""

    away: bool = False
    silent: bool = False
    reports: list[list[Any]] = field(default_factory=list)

    def key(self, *parts: str) -> str:
        return ":".join(parts)

    def add_script(self, name: str, text: str) -> None:
        return None

    async def eval_script(self, name: str, keys: list[str], arguments: list[Any]) -> Any:
        if self.away:
            raise StateUnavailable("breakers")
        if name == "breaker_probe":
            if self.silent:
                await asyncio.Event().wait()
            return 0
        self.reports.append(arguments[7:])
        return []


async def half_open(store: Store) -> BreakerBoard:
    now = [0.0]
    board = BreakerBoard(store, rules=RULES, now_ms=lambda: now[0])  # type: ignore[arg-type]
    board.note_failure(BAD)
    now[0] += 101
    return board


async def test_who_leaves_while_the_store_is_asked_gives_the_place_back_there_too() -> None:
    store = Store(silent=True)
    board = await half_open(store)
    asking = asyncio.create_task(board.enter((BAD,)))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait({asking})
    assert board.wait_ms(BAD) == 0
    await board.sync()
    assert store.reports == [[BAD, "probe", 0, 0, 0]]


async def test_a_probe_s_success_is_told_again_when_the_store_did_not_hear_it() -> None:
    store = Store()
    board = await half_open(store)
    passage = await board.enter((BAD,))
    assert isinstance(passage, Passage)
    passage.succeeded()
    store.away = True
    with pytest.raises(StateUnavailable):
        await board.sync()
    store.away = False
    await board.sync()
    assert store.reports == [[BAD, "probe", 1, 0, 0]]
