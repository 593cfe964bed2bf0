"""The soak test's books and its verdict. Pure: what clients, upstream and gateways wrote goes in.

Three accounts of every request are compared: what the client saw, what the upstream did, and the
gateway's decision record; and for each API key, what the store says was charged against the sum of
the requests. Where a worker was killed with a request in its hands the charge is not known to the
micro-dollar; then it has to lie between nothing and the request's worst case.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from bench._soak_upstream import PROMPT_TOKENS
from experts.errors import UpstreamTimeout

INPUT_MICRO_USD, OUTPUT_MICRO_USD = 2, 10  # per token, of every expert here
WORST_CASE_MICRO_USD = 2_000  # far above what any plan here may cost
_COUNTED_PROMPT_MAX = 64
_AROUND_A_KILL_S = 3.0
_RECORD_DUE_S = 15.0  # a record may wait that long for the store, and goes with its worker
_SHOWN_MAX = 20


@dataclass(slots=True)
class Seen:
    """One request as its client saw it. ``outcome``: ok, error, cancelled, broken, hung, cut."""

    request: str
    key: str
    kind: str
    began_s: float
    ended_s: float = 0.0
    outcome: str = ""
    status: int = 0
    code: str = ""
    cost_micro_usd: int = 0


@dataclass(slots=True)
class Books:
    """Everything that was written down during a run. Times are on one monotonic clock."""

    seen: list[Seen] = field(default_factory=list)
    upstream: list[dict[str, Any]] = field(default_factory=list)
    records: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by request id
    charged_micro_usd: dict[str, int] = field(default_factory=dict)  # by key
    reserved_micro_usd: dict[str, int] = field(default_factory=dict)
    kills_s: list[float] = field(default_factory=list)


def verdict(books: Books) -> dict[str, Any]:
    """What was lost, doubled or mischarged, with examples; ``passed`` when nothing was."""
    calls: dict[str, list[dict[str, Any]]] = {}
    for entry in books.upstream:
        calls.setdefault(entry["request"], []).append(entry)
    began_s = books.seen[0].began_s
    lost = [
        _shown(one) | {"at_s": round(one.began_s - began_s, 1)}
        for one in books.seen
        if _is_lost(one, books)
    ]
    doubled = [
        {"request": one.request, "calls": calls[one.request]}
        for one in books.seen
        if _is_doubled(calls.get(one.request, []))
    ]
    mischarged = [
        problem
        for one in books.seen
        if (problem := _mischarge(one, calls.get(one.request, []), books))
    ]
    keys = _key_problems(books)
    held = {key: amount for key, amount in books.reserved_micro_usd.items() if amount}
    problems = {
        "lost": lost,
        "doubled": doubled,
        "mischarged": mischarged,
        "keys_mischarged": keys,
        "still_reserved": [held] if held else [],
        "unrecorded": [_shown(one) for one in books.seen if _is_unrecorded(one, books)],
    }
    return {
        "passed": not any(problems.values()),
        **{name: len(found) for name, found in problems.items()},
        "kills_s": [round(kill_s - books.seen[0].began_s, 1) for kill_s in books.kills_s],
        "examples": {name: found[:_SHOWN_MAX] for name, found in problems.items() if found},
        "outcomes": dict(Counter(f"{one.kind}: {one.outcome}" for one in books.seen)),
        "codes": dict(Counter(one.code for one in books.seen if one.code)),
        "fates": dict(Counter(f"{entry['model']}: {entry['fate']}" for entry in books.upstream)),
    }


def _is_lost(one: Seen, books: Books) -> bool:
    """Ended without an answer, an error or an error event, and no worker died with it."""
    if one.outcome in ("hung", "cut"):
        return True
    return one.outcome in ("", "broken") and not _near_a_kill(one, books)


def _near_a_kill(one: Seen, books: Books) -> bool:
    return any(
        one.began_s - 0.5 <= kill_s <= one.ended_s + _AROUND_A_KILL_S for kill_s in books.kills_s
    )


def _is_unrecorded(one: Seen, books: Books) -> bool:
    if one.outcome != "ok" or books.records.get(one.request):
        return False
    return not any(
        0 <= kill_s - one.began_s <= one.ended_s - one.began_s + _RECORD_DUE_S
        for kill_s in books.kills_s
    )


def _is_doubled(calls: list[dict[str, Any]]) -> bool:
    """An expert generated a whole answer twice for one request."""
    completed = Counter(entry["model"] for entry in calls if entry["completed"])
    return any(count > 1 for count in completed.values())


def _mischarge(one: Seen, calls: list[dict[str, Any]], books: Books) -> dict[str, Any] | None:
    """A request whose cost does not follow from what the upstream generated for it."""
    if one.outcome != "ok":
        return None
    completed = [_price(entry["tokens"]) for entry in calls if entry["completed"]]
    drafts = [entry for entry in calls if not entry["completed"] and entry["sent"]]
    most = sum(completed) + sum(_price(entry["sent"], _COUNTED_PROMPT_MAX) for entry in drafts)
    if one.kind == "cascade stream":  # a draft may have ended upstream before it was aborted here
        most = sum(_price(entry["tokens"], _COUNTED_PROMPT_MAX) for entry in calls)
    records = books.records.get(one.request, [])
    late = _given_up(records)
    heard = [_price(e["tokens"]) for e in calls if e["completed"] and e["model"] not in late]
    full = min(completed, default=0) if one.kind == "cascade stream" else sum(heard)
    if not completed or not full <= one.cost_micro_usd <= most:
        return _shown(one) | {"expected": [full, most], "calls": calls}
    if any(record["cost_micro_usd"] != one.cost_micro_usd for record in records):
        return _shown(one) | {"records": [record["cost_micro_usd"] for record in records]}
    return None


def _given_up(records: list[dict[str, Any]]) -> set[str]:
    """Experts that the gateway gave up on before it heard anything of them.

    Such an expert may have written its whole answer in that very moment. Nobody saw it, so it is
    charged for or not, as the gateway still learned of it or not.
    """
    stages = [stage for record in records for stage in record.get("stages", ())]
    return {stage["expert"] for stage in stages if stage["error"] == UpstreamTimeout.__name__}


def _price(tokens: int, prompt_tokens: int = PROMPT_TOKENS) -> int:
    return prompt_tokens * INPUT_MICRO_USD + tokens * OUTPUT_MICRO_USD


def _key_problems(books: Books) -> list[dict[str, Any]]:
    problems = []
    for key, charged in books.charged_micro_usd.items():
        least = most = 0
        for one in books.seen:
            if one.key == key:
                low, high = _charge(one, books)
                least, most = least + low, most + high
        if not least <= charged <= most:
            problems.append({"key": key, "charged": charged, "expected": [least, most]})
    return problems


def _charge(one: Seen, books: Books) -> tuple[int, int]:
    """Bounds of what a request has cost its key."""
    if one.outcome == "ok":  # settled before its last byte
        return one.cost_micro_usd, one.cost_micro_usd
    records = books.records.get(one.request, [])
    if _near_a_kill(one, books):
        cost = max((record["cost_micro_usd"] for record in records), default=WORST_CASE_MICRO_USD)
        return 0, cost
    cost = sum(record["cost_micro_usd"] for record in records)
    return cost, cost


def _shown(one: Seen) -> dict[str, Any]:
    return {
        "request": one.request,
        "kind": one.kind,
        "outcome": one.outcome,
        "status": one.status,
        "code": one.code,
        "cost_micro_usd": one.cost_micro_usd,
        "took_s": round(one.ended_s - one.began_s, 3),
    }
