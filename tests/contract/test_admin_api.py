"""The admin port in process, over a real store: who may use it, and what it does."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx2
import pytest

from deployments.host_record import HostRecord, PoolRecord
from deployments.store import StateStore
from experts.catalogue import Catalogue
from gateway.admin.app import create_admin_app
from gateway.admin.parts import AdminParts
from gateway.app import Readiness
from gateway.console.page import console_page
from gateway.keys import digest_of
from gateway.metrics import Metrics
from gateway.state.breakers import BreakerBoard
from gateway.state.decisions import DecisionLog
from gateway.state.keys import KeyLedger, KeyStore
from gateway.state.moves import MoveLog, MoveRecord
from gateway.state.policies import PolicyFollower, PolicyStore
from policies.live import PolicyWatcher
from tests.contract.gateway_kit import spec

pytestmark = pytest.mark.valkey

KEY = "a-key-of-an-operator"
SMALL = "version: 1\ndefault: small\ncaps: {cost_usd: 0.01}\n"
LARGE = SMALL.replace("small", "large")


@dataclass
class Hosts:
    records: list[HostRecord]
    stale: bool = False


@dataclass
class Desk:
    parts: AdminParts
    store: StateStore

    @asynccontextmanager
    async def client(
        self, key: str | None = KEY, base_url: str = "http://127.0.0.1:8001", **headers: str
    ) -> AsyncIterator[httpx2.AsyncClient]:
        transport = httpx2.ASGITransport(app=create_admin_app(self.parts, key=key))
        sent = {k.replace("_", "-"): v for k, v in headers.items()}
        if key is not None:
            sent.setdefault("authorization", f"Bearer {key}")
        async with httpx2.AsyncClient(
            transport=transport, base_url=base_url, headers=sent
        ) as client:
            yield client


@pytest.fixture
def desk(stand_alone_url: str, tmp_path: Path, namespace: str) -> Desk:
    store = StateStore(stand_alone_url, timeout_ms=5_000, namespace=namespace)
    (tmp_path / "auto.yaml").write_text(SMALL)
    specs = [spec("small"), spec("large", description="<script>alert(1)</script>")]
    catalogue = Catalogue({s.id: s for s in specs})
    watcher, policies = PolicyWatcher(tmp_path, catalogue.ids, "auto"), PolicyStore(store)
    record = HostRecord(
        "h-1",
        "http://h:1",
        ("large",),
        resident="large",
        queue_depths={"large": 3},
        heartbeat_ms=9,
        pools=(PoolRecord("arch", 90, 40, ("large",), ("large",)),),
    )

    async def readiness() -> Readiness:
        return Readiness(degraded={"expert large": "warming up"})

    return Desk(
        AdminParts(
            catalogue=catalogue,
            keys=KeyStore(store),
            ledger=KeyLedger(store),
            decisions=DecisionLog(store),
            policies=watcher,
            policy_store=policies,
            follower=PolicyFollower(policies, watcher.set_overrides),
            hosts=Hosts([record]),
            moves=MoveLog(store),
            breakers=BreakerBoard(),
            metrics=Metrics(),
            readiness=readiness,
            wall_ms=lambda: 1_000,
            random_bytes=secrets.token_bytes,
        ),
        store,
    )


@pytest.fixture(autouse=True)
async def clean(desk: Desk) -> AsyncIterator[None]:
    yield
    for key in await desk.store.command("KEYS", desk.store.key("*")):
        await desk.store.command("DEL", key)
    await desk.store.aclose()


PATHS = ("keys", "policies", "policies/auto", "experts", "residency", "breakers", "decisions")


@pytest.mark.parametrize("sent", ["", "Bearer wrong", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}"])
async def test_every_admin_path_needs_the_key(desk: Desk, sent: str) -> None:
    async with desk.client(authorization=sent) as client:
        for path in (*PATHS, "status", "metrics", "no/such/path"):
            assert (await client.get(f"/admin/{path}")).status_code == 401, path
        assert (await client.post("/admin/keys", json={"name": "x"})).status_code == 401
        assert (await client.get("/")).status_code == 200  # the page itself knows nothing
    assert await desk.parts.keys.list() == []


async def test_without_a_key_only_this_machine_and_no_other_page_is_answered(desk: Desk) -> None:
    for name in ("127.0.0.1:8001", "localhost:8001", "[::1]:8001"):
        async with desk.client(None, f"http://{name}") as client:
            assert (await client.get("/admin/keys")).status_code == 200, name
    for name in ("rebound.example:8001", "10.0.0.7:8001"):
        async with desk.client(None, f"http://{name}") as client:
            assert (await client.get("/admin/keys")).status_code == 401, name
    for headers in (
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"sec_fetch_site": "cross-site"},
    ):
        async with desk.client(None, **headers) as client:
            assert (await client.post("/admin/keys", json={"name": "x"})).status_code == 401
    async with desk.client(None, origin="http://127.0.0.1:8001") as client:
        assert (await client.post("/admin/keys", json={"name": "x"})).status_code == 201


async def test_a_key_is_made_listed_and_revoked_and_its_secret_is_shown_once(desk: Desk) -> None:
    order = {"name": "team", "experts": ["small"], "budgets_usd": {"day": "2.50"}}
    async with desk.client() as client:
        made = (await client.post("/admin/keys", json=order)).json()
        found = await desk.parts.keys.find(digest_of(made["secret"]))
        assert found is not None
        assert found.budgets.day == 2_500_000
        listed = await client.get("/admin/keys")
        assert made["secret"] not in listed.text
        assert digest_of(made["secret"]) not in listed.text
        assert listed.json()["keys"][0]["experts"] == ["small"]
        assert (await client.post(f"/admin/keys/{made['id']}/revoke")).status_code == 200
        assert (await client.get("/admin/keys")).json()["keys"][0]["revoked_ms"]
        assert (await client.post("/admin/keys/key-none/revoke")).status_code == 400


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"name": ""},
        {"name": "x", "experts": ["nobody"]},
        {"name": "x", "budgets_usd": {"day": 2.5}},
        {"name": "x", "budgets_usd": {"day": "-1"}},
        {"name": "x", "budgets_usd": {"week": "1"}},
        {"name": "x", "requests_per_minute": 0},
        {"name": "x", "unknown": 1},
        {"name": "a\u0007b"},
    ],
)
async def test_a_wrong_order_for_a_key_is_explained_and_makes_none(desk: Desk, wrong: Any) -> None:
    async with desk.client() as client:
        reply = await client.post("/admin/keys", json=wrong)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]
    assert await desk.parts.keys.list() == []


async def test_a_version_is_checked_activated_tried_and_rolled_back(desk: Desk) -> None:
    async with desk.client() as client:
        before = await client.get("/admin/policies/auto")
        tag, file_digest = before.headers["etag"], before.json()["digest"]
        bad = await client.post("/admin/policies/auto/activate", json={"text": LARGE + "x: 1\n"})
        assert bad.status_code == 400
        assert "auto:4" in bad.json()["error"]["message"]  # the line at fault
        done = await client.post(
            "/admin/policies/auto/activate", json={"text": LARGE}, headers={"if-match": tag}
        )
        assert (done.status_code, done.json()["source"]) == (200, "store")
        large = done.json()["digest"]
        assert desk.parts.policies.current.default_policy.digest == large
        late = await client.post("/admin/policies/auto/rollback", headers={"if-match": tag})
        assert (late.status_code, late.json()["error"]["code"]) == (412, "revision_changed")
        back = await client.post(
            "/admin/policies/auto/rollback", headers={"if-match": done.headers["etag"]}
        )
        assert (back.json()["digest"], back.json()["source"]) == (file_digest, "file")
        trial = await client.post(
            "/admin/policies/auto/canary", json={"digest": large, "share": 0.25}
        )
        assert trial.json()["canary"] == {"digest": large, "share": 0.25}
        assert desk.parts.policies.current.canaries["auto"].share == 0.25
        ended = await client.delete("/admin/policies/auto/canary")
        assert ended.json()["canary"] is None
        for share in (0, 1.5, -1):
            refused = await client.post(
                "/admin/policies/auto/canary", json={"digest": large, "share": share}
            )
            assert refused.status_code == 400


async def test_a_bad_version_never_disturbs_what_is_in_force(desk: Desk) -> None:
    before = desk.parts.policies.current
    async with desk.client() as client:
        for text in ("", "version: 2", "a: [", SMALL.replace("small", "nobody"), "x" * 70_000):
            reply = await client.post("/admin/policies/auto/activate", json={"text": text})
            assert reply.status_code == 400
        assert (await client.post("/admin/policies/..%2fx/rollback")).status_code in (400, 404)
        assert (await client.post("/admin/policies/auto/activate", json={})).status_code == 400
    assert desk.parts.policies.current == before


async def test_decisions_experts_and_hosts_can_be_looked_at(desk: Desk) -> None:
    log = desk.parts.decisions
    for n in range(3):
        log.append({"decision_id": f"d{n}", "n": n})
    await log.flush()
    async with desk.client() as client:
        newest = (await client.get("/admin/decisions?limit=2")).json()
        assert [d["n"] for d in newest["decisions"]] == [2, 1]
        log.append({"decision_id": "d3", "n": 3})
        await log.flush()
        after = (await client.get(f"/admin/decisions?after={newest['last']}")).json()
        assert [d["n"] for d in after["decisions"]] == [3]
        assert (await client.get("/admin/decisions?after=%2B")).status_code == 400
        assert (await client.get("/admin/decisions?limit=100000")).status_code == 400
        experts = {e["id"]: e for e in (await client.get("/admin/experts")).json()["experts"]}
        assert experts["large"]["resident_on"] == ["h-1"]
        assert experts["large"]["waiting"] == 3
        await desk.parts.moves.append(MoveRecord(5, "pool", "h-1", "large", "done", "", 2.0))
        residency = (await client.get("/admin/residency")).json()
        (shown,) = residency["hosts"]
        assert shown["heartbeat_age_ms"] == 991
        assert (shown["pool_bytes"], shown["pooled_bytes"]) == (90, 40)
        assert shown["pools"][0]["pooled"] == ["large"]
        assert [move["expert"] for move in residency["moves"]] == ["large"]
        status = (await client.get("/admin/status")).json()
        assert (status["status"], status["money"]["spent_usd"]) == ("degraded", 0.0)


async def test_a_store_that_is_away_is_said_to_be(desk: Desk) -> None:
    away = StateStore("redis://127.0.0.1:1/0", timeout_ms=200)
    parts = replace(desk.parts, policy_store=PolicyStore(away), keys=KeyStore(away))
    async with Desk(parts, away).client() as client:
        for call in (
            client.get("/admin/keys"),
            client.post("/admin/policies/auto/activate", json={"text": LARGE}),
        ):
            reply = await call
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "state_unavailable"
    await away.aclose()


# --- the console ---------------------------------------------------------------------------------


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))


def test_the_console_is_one_page_that_loads_nothing_and_trusts_nothing() -> None:
    page = console_page()
    text = page.html.decode()
    elements = Elements()
    elements.feed(text)
    for tag, attributes in elements.seen:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert attributes.get("src") is None
        assert attributes.get("href", "data:,") == "data:,"
    assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write", text)
    script = text.partition("<script>")[2].partition("</script>")[0]
    assert not re.search(r"\beval\(|new Function", script)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = page.headers["content-security-policy"]
    assert f"script-src 'sha256-{digest}'" in policy
    assert "unsafe" not in policy
    assert {"default-src 'none'", "frame-ancestors 'none'"} <= set(policy.split("; "))


async def test_the_paths_the_console_asks_for_exist(desk: Desk) -> None:
    text = console_page().html.decode()
    asked = set(re.findall(r'\["([a-z]+)[?"]', text))
    async with desk.client() as client:
        for path in asked & {"status", *PATHS}:
            assert (await client.get(f"/admin/{path}")).status_code == 200
    assert {"status", "experts", "residency", "policies", "decisions", "keys"} <= asked


async def test_answers_are_json_whatever_stands_in_them(desk: Desk) -> None:
    """Markup in a description stays data."""
    async with desk.client() as client:
        reply = await client.get("/admin/experts")
    assert reply.headers["content-type"] == "application/json"
    assert json.loads(reply.text)["experts"][1]["description"] == "<script>alert(1)</script>"
