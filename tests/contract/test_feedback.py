"""Feedback end to end: a real store, the HTTP endpoint, and what it changes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, cast

import openai
import pytest

from deployments.store import StateStore
from experts.types import Price
from gateway.access import AccessControl
from gateway.feedback import Beta, Feedback, draw_expert, outcome_rows
from gateway.keys import KeyBudgets, KeyLimits, KeyScope, digest_of, key_secret
from gateway.state.decisions import DecisionLog
from gateway.state.feedback import EVIDENCE_MAX, FeedbackStore, Given
from gateway.state.keys import KeyLedger, KeyStore
from tests.contract.gateway_kit import make_gateway, openai_client, spec

pytestmark = pytest.mark.valkey

POLICY = """
version: 1
default: first
fallbacks: [spare]
explore: {share: 1.0}
caps: {stages: 1, cost_usd: 1.0, deadline_ms: 60000}
"""
SECRETS = [key_secret(bytes([n]) * 32) for n in (1, 2)]


def record(name: str, **changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "decision_id": name,
        "key_id": None,
        "expert": "e",
        "category": "general talk",
        "input_sha256": "ab",
        "cost_micro_usd": 7,
        "input_tokens": 3,
        "output_tokens": 4,
        "at_ms": 1,
        "policy": "auto",
    }
    return fields | changes


@pytest.fixture
async def decisions(store: StateStore) -> AsyncIterator[DecisionLog]:
    log = DecisionLog(store, keep_records=20)
    yield log
    await log.aclose()


async def test_a_decision_counts_once_and_the_last_word_replaces_the_first(
    store: StateStore, decisions: DecisionLog
) -> None:
    feedback = FeedbackStore(store)
    for name in ("d1", "d2"):
        decisions.append(record(name))
    await decisions.flush()
    given = [
        await feedback.give(Feedback(name, score), None)
        for name, score in (("d1", 1.0), ("d1", 1.0), ("d2", 0.25), ("d1", 0.0))
    ]
    assert given == [Given.COUNTED, Given.SAME, Given.COUNTED, Given.CHANGED]
    await feedback.refresh()
    assert feedback.posteriors("general talk") == {"e": Beta(1.25, 2.75)}
    rows = outcome_rows([one async for one in feedback.records()])
    assert {(row["score"], row["expert"], row["input_sha256"]) for row in rows} == {
        (0.0, "e", "ab"),
        (0.25, "e", "ab"),
    }
    assert rows[0]["cost"] == pytest.approx(7e-6)


async def test_two_gateways_that_are_told_the_same_count_it_once(
    open_store: Callable[[], StateStore], decisions: DecisionLog
) -> None:
    decisions.append(record("d1"))
    await decisions.flush()
    gateways = [FeedbackStore(open_store()) for _ in range(4)]
    given = await asyncio.gather(*(g.give(Feedback("d1", 1.0), None) for g in gateways))
    assert sorted(given) == [Given.COUNTED, *[Given.SAME] * 3]


async def test_what_the_log_has_forgotten_can_no_longer_be_judged(
    store: StateStore, decisions: DecisionLog
) -> None:
    feedback = FeedbackStore(store)
    for number in range(100):
        decisions.append(record(f"d{number}"))
        if number == 5:
            await decisions.flush()
            assert await feedback.give(Feedback("d3", 1.0), None) is Given.COUNTED
    await decisions.flush()
    assert await feedback.give(Feedback("d3", 1.0), None) is Given.UNKNOWN
    assert await feedback.give(Feedback("d99", 1.0), None) is Given.COUNTED
    assert await store.command("XLEN", store.key("decisions")) <= 40
    kept = await store.command("XLEN", store.key("decisions"))
    assert await store.command("HLEN", store.key("decisions", "ids")) == kept
    assert await store.command("HLEN", store.key("feedback", "given")) == 1


async def test_old_evidence_fades_so_that_a_changed_expert_can_recover(
    store: StateStore, decisions: DecisionLog
) -> None:
    feedback = FeedbackStore(store)
    key = store.key("feedback", "posteriors")
    await store.command("HSET", key, "general talk e", f"0 {EVIDENCE_MAX:.0f}")
    decisions.append(record("d1"))
    await decisions.flush()
    await feedback.give(Feedback("d1", 1.0), None)
    await feedback.refresh()
    known = feedback.posteriors("general talk")["e"]
    assert known.alpha + known.beta - 2 == pytest.approx(EVIDENCE_MAX)
    assert known.alpha > 1.99 * 1000 / 1001


async def test_only_the_key_that_asked_may_judge_and_errors_name_the_field(
    store: StateStore, decisions: DecisionLog, tmp_path: Path
) -> None:
    keys = KeyStore(store)
    for secret in SECRETS:
        await keys.create(digest_of(secret), "k", KeyScope(), KeyLimits(), KeyBudgets())
    gate = AccessControl(keys, KeyLedger(store), require_keys=True, request_timeout_ms=60_000)
    gateway = make_gateway(
        tmp_path,
        [spec("first"), spec("spare")],
        policies={"auto": POLICY},
        gate=gate,
        decisions=decisions,
        feedback=FeedbackStore(store),
    )

    async def post(secret: str, body: Any) -> Any:
        async with openai_client("http://gateway", gateway.app, api_key=secret) as client:
            return await client.post("/feedback", body=body, cast_to=object)

    async with openai_client("http://gateway", gateway.app, api_key=SECRETS[0]) as client:
        answer = await client.chat.completions.create(
            model="auto", messages=[{"role": "user", "content": "x"}]
        )
    await decisions.flush()
    decision = (answer.model_extra or {})["coe"]["decision_id"]
    for secret, body, field in (
        (SECRETS[1], {"decision_id": decision, "thumb": "up"}, "decision_id"),
        (SECRETS[0], {"decision_id": "never", "thumb": "up"}, "decision_id"),
        (SECRETS[0], {"decision_id": decision, "score": 2}, "score"),
        (SECRETS[0], {"decision_id": decision, "score": 1, "thumb": "up"}, "score"),
        (SECRETS[0], {"decision_id": decision, "thumb": "sideways"}, "thumb"),
        (SECRETS[0], {"decision_id": decision, "stars": 5}, "stars"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            await post(secret, body)
        assert refused.value.param == field
    with pytest.raises(openai.AuthenticationError):
        await post(key_secret(b"\7" * 32), {"decision_id": decision, "thumb": "up"})
    reply = await post(SECRETS[0], {"decision_id": decision, "thumb": "up"})
    assert (reply["score"], reply["result"]) == (1.0, "counted")
    await gate.aclose()


async def test_a_score_that_comes_before_its_decision_is_written_down_is_counted(
    store: StateStore, decisions: DecisionLog, tmp_path: Path
) -> None:
    looks: list[Given] = []

    class WrittenAfterTheFirstLook(FeedbackStore):
        async def give(self, feedback: Feedback, key_id: str | None) -> Given:
            looks.append(await super().give(feedback, key_id))
            if len(looks) == 1:
                await decisions.flush()
            return looks[-1]

    gateway = make_gateway(
        tmp_path,
        [spec("first"), spec("spare")],
        policies={"auto": POLICY},
        decisions=decisions,
        feedback=WrittenAfterTheFirstLook(store),
    )
    decisions.append(record("just now"))
    body = {"decision_id": "just now", "thumb": "up"}
    async with openai_client("http://gateway", gateway.app) as client:
        reply: Any = await client.post("/feedback", body=body, cast_to=object)
    assert looks == [Given.UNKNOWN, Given.COUNTED]
    assert reply["result"] == "counted"


async def test_a_policy_that_explores_comes_to_prefer_what_people_liked(
    store: StateStore, decisions: DecisionLog, tmp_path: Path
) -> None:
    feedback = FeedbackStore(store)
    gateway = make_gateway(
        tmp_path,
        [spec("first"), spec("spare")],
        policies={"auto": POLICY},
        decisions=decisions,
        feedback=feedback,
    )
    answered: list[str] = []
    async with openai_client("http://gateway", gateway.app) as client:
        for number in range(50):
            answer = await client.chat.completions.create(
                model="auto", messages=[{"role": "user", "content": f"q{number}"}]
            )
            answered.append(answer.model)
            await decisions.flush()
            decision = (answer.model_extra or {})["coe"]["decision_id"]
            score = 1.0 if answer.model == "spare" else 0.0
            await feedback.give(Feedback(decision, score), None)
            await feedback.refresh()
    assert "first" in answered[:25], "it was tried"
    assert answered[-20:].count("spare") >= 16


async def test_who_cannot_be_tried_within_the_caps_is_not_said_to_have_been(tmp_path: Path) -> None:
    class Liked:
        def posteriors(self, category: str) -> dict[str, Beta]:
            return {"dear": Beta(1_000, 1), "first": Beta(1, 1_000), "spare": Beta(1, 1_000)}

    policy = POLICY.replace("default: first", "default: first\nroutes: {other: dear}")
    policy = policy.replace("cost_usd: 1.0", "cost_usd: 0.005")
    gateway = make_gateway(
        tmp_path,
        [spec("first"), spec("spare"), spec("dear", price=Price(100_000_000, 200_000_000))],
        policies={"auto": policy},
        feedback=cast("FeedbackStore", Liked()),
    )
    body = {"model": "auto", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 64}
    async with openai_client("http://gateway", gateway.app) as client:
        view: Any = await client.post("/route", body=body, cast_to=object)
    assert [stage["expert"] for stage in view["plan"]["stages"]] == ["first"]
    assert "explored" not in str(view["affinity"])


def test_drawing_follows_the_posteriors() -> None:
    dice = random.Random(1)
    known = {"good": Beta(90, 10), "bad": Beta(10, 90)}
    assert draw_expert([], known, dice) is None
    draws = [draw_expert(("good", "bad", "new"), known, dice) for _ in range(2_000)]
    assert draws.count("bad") < 5
    assert 0.05 < draws.count("new") / len(draws) < 0.2, "nothing is known of it: worth a try"
