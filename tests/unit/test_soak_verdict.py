"""The judge of bench/soak.py: it has to find what it is there to find."""

from __future__ import annotations

from typing import Any

import pytest

from bench._soak_ledger import Books, Seen, verdict
from bench._soak_upstream import PROMPT_TOKENS

PRICE = PROMPT_TOKENS * 2 + 5 * 10


def call(request: str, **changes: Any) -> dict[str, Any]:
    fields = {"model": "flaky", "fate": "ok", "sent": 5, "tokens": 5, "completed": True}
    return {"request": request, **fields, **changes}


def record(cost: int, name: str = "d") -> dict[str, Any]:
    return {"decision_id": name, "cost_micro_usd": cost}


def good() -> Books:
    """One answer, one abandoned stream, one refusal."""
    return Books(
        seen=[
            Seen("r1", "k", "whole", 10.0, 10.1, "ok", 200, "", PRICE),
            Seen("r2", "k", "cancelled stream", 11.0, 11.1, "cancelled", 200),
            Seen("r3", "k", "bad body", 12.0, 12.1, "error", 400, "400 invalid_request"),
        ],
        upstream=[call("r1"), call("r2", completed=False, sent=2)],
        records={"r1": [record(PRICE)], "r2": [record(42)]},
        charged_micro_usd={"k": PRICE + 42},
        reserved_micro_usd={"k": 0},
    )


def test_books_that_agree_pass() -> None:
    assert verdict(good())["passed"]


def spoil_hung(books: Books) -> None:
    books.seen[2].outcome = "hung"


def spoil_cut(books: Books) -> None:
    books.seen[1].outcome = "cut"


def spoil_broken(books: Books) -> None:
    books.seen[2].outcome = "broken"


def spoil_doubled(books: Books) -> None:
    books.upstream.append(call("r1"))


def spoil_cost(books: Books) -> None:
    books.seen[0].cost_micro_usd += 10
    books.records["r1"] = [record(PRICE + 10)]
    books.charged_micro_usd["k"] += 10


def spoil_record(books: Books) -> None:
    books.records["r1"] = [record(PRICE - 1)]


def spoil_unrecorded(books: Books) -> None:
    del books.records["r1"]


def spoil_overcharge(books: Books) -> None:
    books.charged_micro_usd["k"] += 1


def spoil_undercharge(books: Books) -> None:
    books.charged_micro_usd["k"] -= 1


def spoil_reserved(books: Books) -> None:
    books.reserved_micro_usd["k"] = 5


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (spoil_hung, "lost"),
        (spoil_cut, "lost"),
        (spoil_broken, "lost"),
        (spoil_doubled, "doubled"),
        (spoil_cost, "mischarged"),
        (spoil_record, "mischarged"),
        (spoil_unrecorded, "unrecorded"),
        (spoil_overcharge, "keys_mischarged"),
        (spoil_undercharge, "keys_mischarged"),
        (spoil_reserved, "still_reserved"),
    ],
)
def test_each_kind_of_fault_is_found(spoil: Any, problem: str) -> None:
    books = good()
    spoil(books)
    judged = verdict(books)
    assert not judged["passed"]
    assert judged[problem] == 1


def test_what_a_killed_worker_took_along_is_neither_lost_nor_mischarged() -> None:
    books = good()
    books.seen[1].outcome = "broken"
    del books.records["r2"]
    books.kills_s = [11.05]
    for charged in (PRICE, PRICE + 42):
        books.charged_micro_usd["k"] = charged
        assert verdict(books)["passed"]


@pytest.mark.parametrize("charged", [PRICE, 2 * PRICE])
def test_an_answer_that_came_when_the_gateway_had_given_up_may_be_charged_or_not(
    charged: int,
) -> None:
    books = failed_over("UpstreamTimeout", charged)
    assert verdict(books)["passed"]


def test_an_answer_that_the_gateway_heard_is_charged() -> None:
    assert verdict(failed_over(None, PRICE))["mischarged"] == 1


def failed_over(error: str | None, charged: int) -> Books:
    """Two experts wrote a whole answer for the first request."""
    books = good()
    stages = [{"expert": "late", "error": error}, {"expert": "flaky", "error": None}]
    books.upstream.append(call("r1", model="late"))
    books.seen[0].cost_micro_usd = charged
    books.records["r1"] = [record(charged) | {"stages": stages}]
    books.charged_micro_usd["k"] = charged + 42
    return books
