"""API keys as the official client meets them: who may ask, for what, how much, how often."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from deployments.store import StateStore
from experts.types import ExpertSpec, Price
from gateway.access import AccessControl
from gateway.keys import KeyBudgets, KeyLimits, KeyScope, digest_of, key_secret
from gateway.state.keys import KeyLedger, KeyStore, KeyUsage
from tests.contract.gateway_kit import (
    PLAIN_POLICY,
    Gateway,
    eventually,
    make_gateway,
    openai_client,
    served,
    spec,
)

pytestmark = pytest.mark.valkey

USER: list[Any] = [{"role": "user", "content": "one two three"}]
COST_OF_ONE = 8 * 2  # eight tokens at two dollars per million; the prompt is free here
SLOW_MS = 60_000
POLICIES = {
    "auto": PLAIN_POLICY,
    "other": PLAIN_POLICY.replace("default: echo", "default: [eight]\nfallbacks: [echo]"),
    "open": PLAIN_POLICY + "on_state_outage: {budgets: open}\n",
}


def experts() -> list[ExpertSpec]:
    price = Price(0, 2_000_000)
    return [
        spec("echo", price=price),
        spec("eight", "tokens?count=8", price=price),
        spec("slow", f"tokens?count=8&pace_ms={SLOW_MS}", price=price),
        spec("broken", "fail?status=500", price=price),
    ]


class Keys:
    """A gateway that knows keys, over a real store."""

    def __init__(self, folder: Path, store: StateStore, *, required: bool = True) -> None:
        self.store, self.records = KeyStore(store), KeyStore(store)
        self.ledger = KeyLedger(store)
        self.gate = AccessControl(
            self.store, self.ledger, require_keys=required, request_timeout_ms=60_000
        )
        self.gateway: Gateway = make_gateway(
            folder,
            experts(),
            policies=POLICIES,
            gate=self.gate,
            new_id=lambda: uuid.uuid4().hex,
        )

    async def new(
        self,
        scope: KeyScope | None = None,
        limits: KeyLimits | None = None,
        budgets: KeyBudgets | None = None,
    ) -> str:
        secret = key_secret(secrets.token_bytes(32))
        await self.store.create(
            digest_of(secret),
            "test",
            scope or KeyScope(),
            limits or KeyLimits(),
            budgets or KeyBudgets(),
        )
        return secret

    async def usage(self, secret: str) -> KeyUsage:
        return await self.ledger.usage(digest_of(secret))

    @asynccontextmanager
    async def client(self, secret: str) -> AsyncIterator[AsyncOpenAI]:
        async with openai_client("http://gateway", self.gateway.app, api_key=secret) as client:
            yield client


@pytest.fixture
def store_url(stand_alone_url: str) -> str:
    """One server is enough here: the scripts are tested on both in ``test_store_keys``."""
    return stand_alone_url


@pytest.fixture
async def keys(tmp_path: Path, store: StateStore) -> AsyncIterator[Keys]:
    made = Keys(tmp_path, store)
    yield made
    await made.gate.aclose()


async def ask(client: AsyncOpenAI, model: str = "eight", **more: Any) -> Any:
    return await client.chat.completions.create(
        **{"model": model, "messages": USER, "max_tokens": 8, **more}
    )


# --- who -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", ["unused", key_secret(bytes(32)), "coe-sk-short"])
async def test_a_key_that_is_not_known_is_a_401(keys: Keys, sent: str) -> None:
    async with keys.client(sent) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            await ask(client)
        assert (refused.value.status_code, refused.value.code) == (401, "invalid_api_key")
        assert sent not in str(refused.value.body)
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/route"])
async def test_no_key_at_all_is_a_401_before_the_body_is_looked_at(keys: Keys, path: str) -> None:
    transport = httpx2.ASGITransport(app=keys.gateway.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as http:
        assert (await http.post(path, content=b"{")).status_code == 401
        assert (await http.get("/v1/models")).status_code == 401
        assert (await http.get("/health/ready")).status_code == 200
        known = {"x-api-key": await keys.new()}
        body = {"model": "echo", "messages": USER}
        assert (await http.post("/v1/route", json=body, headers=known)).status_code == 200


async def test_keys_may_be_optional_and_still_count(tmp_path: Path, store: StateStore) -> None:
    keys = Keys(tmp_path, store, required=False)
    for anybody in ("unused", key_secret(bytes(32))):
        async with keys.client(anybody) as client:
            assert (await ask(client)).model == "eight"
    secret = await keys.new(limits=KeyLimits(requests_per_minute=1))
    async with keys.client(secret) as client:
        await ask(client)
        with pytest.raises(openai.RateLimitError):
            await ask(client)
    assert (await keys.usage(secret)).total == COST_OF_ONE


async def test_a_revoked_key_is_refused_from_the_next_request_on(keys: Keys) -> None:
    secret = await keys.new()
    async with keys.client(secret) as client:
        await ask(client)
        (record,) = await keys.store.list()
        await keys.store.revoke(record.id)
        with pytest.raises(openai.AuthenticationError) as refused:
            await ask(client)
    assert "revoked" in str(refused.value)


async def test_a_key_revoked_while_its_request_is_decided_is_refused(keys: Keys) -> None:
    """The look-up saw it valid; the admission, which is atomic, did not."""
    secret = await keys.new()
    record = await keys.store.find(digest_of(secret))
    assert record is not None

    class Stale:
        async def find(self, digest: str) -> Any:
            return record

    keys.gate._keys = Stale()
    await keys.store.revoke(record.id)
    async with keys.client(secret) as client:
        with pytest.raises(openai.AuthenticationError):
            await ask(client)
    assert keys.gateway.scripted("eight").calls == 0


# --- what ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "model", "extra", "denied"),
    [
        (KeyScope(policies=frozenset({"auto"})), "auto", {}, False),
        (KeyScope(policies=frozenset({"auto"})), "coe/other", {}, True),
        (KeyScope(policies=frozenset({"auto"})), "auto", {"policy": "other"}, True),
        (KeyScope(policies=frozenset({"auto"})), "echo", {}, True),
        (KeyScope(experts=frozenset({"echo"})), "echo", {}, False),
        (KeyScope(experts=frozenset({"echo"})), "eight", {}, True),
        (KeyScope(experts=frozenset({"eight"})), "auto", {}, True),
    ],
)
async def test_what_a_key_does_not_permit_is_a_403(
    keys: Keys, scope: KeyScope, model: str, extra: dict[str, Any], denied: bool
) -> None:
    async with keys.client(await keys.new(scope)) as client:
        if not denied:
            assert (await ask(client, model, extra_body={"coe": extra})).model == "echo"
            return
        with pytest.raises(openai.PermissionDeniedError) as refused:
            await ask(client, model, extra_body={"coe": extra})
        assert (refused.value.code, refused.value.param) == ("scope_denied", "model")
    assert sum(keys.gateway.scripted(name).calls for name in ("echo", "eight")) == 0


async def test_experts_outside_the_scope_are_left_out_before_ranking(keys: Keys) -> None:
    async with keys.client(await keys.new(KeyScope(experts=frozenset({"echo"})))) as client:
        assert (await ask(client, "coe/other")).model == "echo", "eight comes first, but may not"
    excluded = keys.gateway.records[-1]["excluded"]
    assert excluded == {"eight": "outside the API key's scope"}


async def test_the_model_list_shows_what_the_key_may_ask_for(keys: Keys) -> None:
    scope = KeyScope(frozenset({"other"}), frozenset({"echo"}))
    async with keys.client(await keys.new(scope)) as client:
        assert [model.id async for model in client.models.list()] == ["coe/other", "echo"]
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("eight")


# --- how much, how often -------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_over_budget_is_a_402_and_charges_nothing(keys: Keys, stream: bool) -> None:
    secret = await keys.new(budgets=KeyBudgets(day=2 * COST_OF_ONE))
    async with keys.client(secret) as client:
        for _ in range(2):
            answer = await ask(client, stream=stream)
            if stream:
                assert [chunk async for chunk in answer]
        with pytest.raises(openai.APIStatusError) as refused:
            await client.copy(max_retries=2).chat.completions.create(
                model="eight", messages=USER, max_tokens=8, stream=stream
            )
    assert (refused.value.status_code, refused.value.code) == (402, "insufficient_quota")
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert 0 < int(refused.value.response.headers["retry-after"]) <= 86_400
    assert keys.gateway.scripted("eight").calls == 2
    usage = await keys.usage(secret)
    assert (usage.day, usage.reserved, usage.running) == (2 * COST_OF_ONE, 0, 0)


async def test_headers_and_429_of_the_rate_limits(keys: Keys) -> None:
    secret = await keys.new(limits=KeyLimits(requests_per_minute=2, tokens_per_minute=100_000))
    async with keys.client(secret) as client:
        first = await client.chat.completions.with_raw_response.create(
            model="eight", messages=USER, max_tokens=8
        )
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"] == "30s"
        assert first.headers["x-ratelimit-limit-tokens"] == "100000"
        assert int(first.headers["x-ratelimit-remaining-tokens"]) < 100_000
        await ask(client)
        with pytest.raises(openai.RateLimitError) as refused:
            await ask(client)
        headers = refused.value.response.headers
        assert refused.value.code == "rate_limit_exceeded"
        assert 15 <= int(headers["retry-after"]) <= 30, "30 s after the first of the two"
        assert headers["x-ratelimit-remaining-requests"] == "0"


async def test_a_request_larger_than_the_limit_is_not_to_be_retried(keys: Keys) -> None:
    async with keys.client(await keys.new(limits=KeyLimits(tokens_per_minute=10))) as client:
        with pytest.raises(openai.RateLimitError) as refused:
            await client.copy(max_retries=2).chat.completions.create(model="eight", messages=USER)
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.value.response.headers
    assert len(keys.gateway.records) == 1


async def test_a_key_without_limits_gets_no_limit_headers(keys: Keys) -> None:
    async with keys.client(await keys.new()) as client:
        answer = await client.chat.completions.with_raw_response.create(
            model="eight", messages=USER
        )
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


@pytest.mark.parametrize(
    ("model", "stream"), [("eight", False), ("eight", True), ("broken", False)]
)
async def test_one_at_a_time_never_refuses_who_waits_for_the_answer(
    keys: Keys, monkeypatch: pytest.MonkeyPatch, model: str, stream: bool
) -> None:
    """However slow the store is to settle: the last byte comes after it."""
    settle = keys.ledger.settle

    async def settle_slowly(*arguments: Any) -> Any:
        await asyncio.sleep(0.05)
        return await settle(*arguments)

    monkeypatch.setattr(keys.ledger, "settle", settle_slowly)
    secret = await keys.new(limits=KeyLimits(concurrent_requests=1))
    async with served(keys.gateway.app) as url, openai_client(url, api_key=secret) as client:
        for _ in range(5):
            if model == "broken":
                with pytest.raises(openai.InternalServerError):  # a 429 would be another class
                    await ask(client, model)
                continue
            answer = await ask(client, model, stream=stream)
            assert not stream or [chunk async for chunk in answer]


async def test_a_failed_request_gives_everything_back(keys: Keys) -> None:
    secret = await keys.new(limits=KeyLimits(concurrent_requests=1), budgets=KeyBudgets(total=100))
    async with keys.client(secret) as client:
        for _ in range(3):
            with pytest.raises(openai.InternalServerError):
                await ask(client, "broken")
    assert await keys.usage(secret) == KeyUsage(0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_is_settled(keys: Keys, stream: bool) -> None:
    secret = await keys.new(limits=KeyLimits(concurrent_requests=1), budgets=KeyBudgets(total=100))
    body = {"model": "slow", "messages": USER, "max_tokens": 8, "stream": stream}
    headers = {"authorization": f"Bearer {secret}"}
    async with served(keys.gateway.app) as url:
        async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
            if stream:
                async with http.stream(
                    "POST", "/v1/chat/completions", json=body, headers=headers
                ) as answer:
                    async for _ in answer.aiter_raw():
                        assert (await keys.usage(secret)).reserved == COST_OF_ONE
                        break
            else:
                asking = asyncio.create_task(
                    http.post("/v1/chat/completions", json=body, headers=headers)
                )
                await eventually(lambda: keys.gateway.scripted("slow").calls == 1)
                asking.cancel()
                await asyncio.wait({asking})
        await eventually(lambda: len(keys.gateway.records) == 1)
        await keys.gate.aclose()
    usage = await keys.usage(secret)
    record = keys.gateway.records[0]
    assert record["outcome"] == "client_closed"
    assert (usage.reserved, usage.running) == (0, 0)
    assert usage.total == record["cost_micro_usd"] < COST_OF_ONE


# --- what is written down ------------------------------------------------------------------------


async def test_the_key_s_id_is_recorded_and_its_secret_nowhere(
    keys: Keys, store: StateStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    secret = await keys.new(limits=KeyLimits(requests_per_minute=1))
    async with keys.client(secret) as client:
        await ask(client)
        with pytest.raises(openai.RateLimitError) as refused:
            await ask(client)
    (record,) = await keys.store.list()
    assert [r["key_id"] for r in keys.gateway.records] == [record.id, record.id]
    kept = [str(keys.gateway.records), str(keys.gateway.journals), repr(record), repr(refused)]
    for key in await store.command("KEYS", store.key("*")):
        kept.append(str(key))
        if await store.command("TYPE", key) == b"hash":
            kept.append(str(await store.command("HGETALL", key)))
    random_part = secret.removeprefix("coe-sk-")
    assert not [text for text in (*kept, caplog.text) if random_part in text]


# --- when the store is away ----------------------------------------------------------------------


async def test_when_the_store_is_away_the_policy_decides(
    tmp_path: Path, plain_server: Any, namespace: str
) -> None:
    store = StateStore(plain_server.url, timeout_ms=2_000, namespace=namespace)
    keys = Keys(tmp_path, store)
    secret = await keys.new(limits=KeyLimits(requests_per_minute=1))
    async with keys.client(secret) as client:
        await ask(client)
        plain_server.kill()
        for _ in range(3):
            assert (await ask(client, "coe/open")).model == "echo"
        for model in ("auto", "eight"):
            with pytest.raises(openai.InternalServerError) as refused:
                await ask(client, model)
            assert (refused.value.status_code, refused.value.code) == (503, "state_unavailable")
            assert refused.value.response.headers["retry-after"]
        with pytest.raises(openai.InternalServerError):
            await client.models.list()
    async with keys.client("unused") as client:
        with pytest.raises(openai.AuthenticationError):
            await ask(client, "coe/open")
    await keys.gate.aclose()
    await store.aclose()


async def test_without_keys_an_outage_changes_nothing(
    tmp_path: Path, plain_server: Any, namespace: str
) -> None:
    plain_server.kill()
    store = StateStore(plain_server.url, timeout_ms=2_000, namespace=namespace)
    keys = Keys(tmp_path, store, required=False)
    async with keys.client("unused") as client:
        assert (await ask(client, "auto")).model == "echo"
    await store.aclose()


async def test_what_was_spent_during_an_outage_is_charged_after_it(
    tmp_path: Path, plain_server: Any, namespace: str
) -> None:
    """Admitted, then the store hangs; the settlement waits for it and is made once."""
    import signal

    store = StateStore(plain_server.url, timeout_ms=1_000, namespace=namespace)
    keys = Keys(tmp_path, store)
    secret = await keys.new(budgets=KeyBudgets(total=1_000))
    async with keys.client(secret) as client:
        stream = await ask(client, stream=True)
        plain_server.send(signal.SIGSTOP)
        assert [chunk async for chunk in stream], "the answer does not wait for the store"
    plain_server.send(signal.SIGCONT)
    async with asyncio.timeout(30):
        while not store.available or (await keys.usage(secret)).total == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert await keys.usage(secret) == KeyUsage(*[COST_OF_ONE] * 4, 0, 0)
    await keys.gate.aclose()
    await store.aclose()


# --- many gateways -------------------------------------------------------------------------------


async def test_gateways_that_share_a_store_share_a_budget(
    tmp_path: Path, open_store: Callable[[], StateStore]
) -> None:
    several = []
    for number in range(3):
        folder = tmp_path / str(number)
        folder.mkdir()
        several.append(Keys(folder, open_store()))
    secret = await several[0].new(budgets=KeyBudgets(total=10 * COST_OF_ONE))

    async def status(keys: Keys) -> int:
        async with keys.client(secret) as client:
            try:
                await ask(client)
            except openai.APIStatusError as error:
                return error.status_code
            return 200

    statuses = await asyncio.gather(*(status(several[n % 3]) for n in range(60)))
    assert (statuses.count(200), statuses.count(402)) == (10, 50)
    assert await several[0].usage(secret) == KeyUsage(*[10 * COST_OF_ONE] * 4, 0, 0)
