"""Pains of people who run such gateways, each by the name of what went wrong elsewhere.

The number is that of the pain in the project's list of them; what users complain of stands in the
test's docstring, what has to hold here in its body.
"""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Any

import httpx2
import pytest

from deployments.store import StateStore
from experts.errors import AuthenticationFailed
from gateway.keys import Access
from gateway.policy_versions import Version, activated
from gateway.state.policies import PolicyFollower, PolicyStore
from policies.policy_set import PolicySet
from tests.contract.gateway_kit import (
    CASCADE_POLICY,
    FixedRouter,
    Gateway,
    make_gateway,
    served,
    spec,
)

ROOT = Path(__file__).parents[2]
CHAT = "/v1/chat/completions"


def body(**more: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": [{"role": "user", "content": "hello"}], **more}


def value(gateway: Gateway, sample: str, **labels: str) -> float:
    gateway.metrics.flush()
    return gateway.metrics.registry.get_sample_value(sample, labels) or 0.0


async def post(gateway: Gateway, path: str = CHAT, **more: Any) -> httpx2.Response:
    transport = httpx2.ASGITransport(app=gateway.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
        return await client.post(path, json=body(**more))


def cascade(folder: Path) -> Gateway:
    return make_gateway(
        folder,
        [
            spec("draft", "tokens?count=6&confidence=0.02"),
            spec("final", "tokens?count=6&confidence=0.98"),
        ],
        policies={"auto": CASCADE_POLICY},
    )


async def test_pain_7_what_a_swap_and_a_queue_cost_is_seen_apart(tmp_path: Path) -> None:
    """Nobody can tell a slow model from one that was not loaded."""
    gateway = make_gateway(tmp_path, [spec("echo", "echo?queue_ms=120&swap_ms=900")])
    reply = await post(gateway)
    assert reply.headers["x-coe-queue-ms"] == "120.0"
    assert reply.headers["x-coe-swap-ms"] == "900.0"
    assert value(gateway, "coe_queue_seconds_sum", expert="echo") == pytest.approx(0.12)
    assert value(gateway, "coe_swap_seconds_sum", expert="echo") == pytest.approx(0.9)
    assert (gateway.records[0]["queue_ms"], gateway.records[0]["swap_ms"]) == (120.0, 900.0)


@pytest.mark.parametrize("stream", [False, True])
async def test_pain_12_the_gateways_share_is_measured_apart_from_the_engines(
    tmp_path: Path, stream: bool
) -> None:
    """The serving layer's part of the first token's time cannot be told from the engine's."""
    gateway = make_gateway(tmp_path, [spec("echo", "tokens?count=3&delay_ms=120&pace_ms=5")])
    await post(gateway, stream=stream)
    (journal,) = gateway.journals
    assert journal.ended_ms is not None
    own_s = value(gateway, "coe_overhead_seconds_sum")
    whole_s = (journal.ended_ms - journal.arrived_ms) / 1000.0
    assert value(gateway, "coe_overhead_seconds_count") == 1
    assert 0 < own_s < whole_s
    assert own_s + journal.experts_ms / 1000.0 == pytest.approx(whole_s, abs=1e-6)
    assert journal.experts_ms >= 120
    if stream:
        engine_s = value(gateway, "coe_expert_first_token_seconds_sum", expert="echo")
        assert 0.12 <= engine_s <= journal.experts_ms / 1000.0


@pytest.mark.valkey
async def test_pain_4_three_replicas_decide_by_one_policy(
    stand_alone_url: str, namespace: str, tmp_path: Path
) -> None:
    """Replicas drift apart: each has its own idea of what is in force."""
    from policies.live import PolicyWatcher

    text = "version: 1\ndefault: {}\ncaps: {{cost_usd: 1}}\n"
    (tmp_path / "auto.yaml").write_text(text.format("small"))
    stores = [StateStore(stand_alone_url, timeout_ms=5_000, namespace=namespace) for _ in range(3)]
    watchers = [PolicyWatcher(tmp_path, ("small", "large"), "auto") for _ in stores]
    followers = [
        PolicyFollower(PolicyStore(store), watcher.set_overrides)
        for store, watcher in zip(stores, watchers, strict=True)
    ]
    version = Version("given", text.format("large"), 1)
    await PolicyStore(stores[0]).change("auto", lambda record: activated(record, version, 1))
    for follower in followers:
        await follower.refresh()
    in_force: list[PolicySet] = [watcher.current for watcher in watchers]
    assert {s.default_policy.default.experts for s in in_force} == {("large",)}
    assert len({s.default_policy.digest for s in in_force}) == 1
    for key in await stores[0].command("KEYS", stores[0].key("*")):
        await stores[0].command("DEL", key)
    for store in stores:
        await store.aclose()


async def test_pain_10_the_escalation_rate_can_be_watched_by_version(tmp_path: Path) -> None:
    """A threshold goes stale and nobody notices."""
    gateway = cascade(tmp_path)
    for _ in range(3):
        await post(gateway)
    (record, *_) = gateway.records
    labels = {"policy": "auto", "digest": record["policy_digest"]}
    assert value(gateway, "coe_policy_escalations_total", **labels) == 3
    assert value(gateway, "coe_policy_requests_total", outcome="ok", **labels) == 3


async def test_pain_11_the_routers_own_time_is_published(tmp_path: Path) -> None:
    """Routing itself is slow, and only a profiler says so."""
    gateway = make_gateway(tmp_path, [spec("echo")], router=FixedRouter())
    reply = await post(gateway)
    assert value(gateway, "coe_router_seconds_count") == 1
    assert float(reply.headers["x-coe-router-ms"]) == pytest.approx(
        gateway.records[0]["router_ms"], abs=0.01
    )


async def test_pain_15_a_thousand_different_callers_leave_no_trace_in_memory(
    tmp_path: Path,
) -> None:
    """Metrics and tables grow with every user, model name and path until the process is killed."""
    gateway = make_gateway(tmp_path, [spec("echo")])
    transport = httpx2.ASGITransport(app=gateway.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:

        async def everything(n: int) -> None:
            headers = {"x-request-id": f"r{n}", "user-agent": uuid.uuid4().hex}
            await client.post(CHAT, json=body(user=f"user-{n}"), headers=headers)
            await client.post(CHAT, json=body(model=f"model-{n}"), headers=headers)
            await client.get(f"/v1/nothing-{n}", headers=headers)

        for n in range(5):
            await everything(n)
        before = gateway.metrics.render().count(b"\n")
        for n in range(5, 60):
            await everything(n)
    assert gateway.metrics.render().count(b"\n") == before


async def test_pain_17_nobody_without_a_key_gets_as_far_as_routing(tmp_path: Path) -> None:
    """Paths that somebody forgot to protect."""

    class Closed:
        async def authenticate(self, secret: str | None) -> Access:
            raise AuthenticationFailed("no key")

        async def settle(self, journal: Any) -> None:
            return None

        def close(self, journal: Any) -> None:
            return None

    router = FixedRouter()
    gateway = make_gateway(tmp_path, [spec("echo")], router=router, gate=Closed())  # type: ignore[arg-type]
    public = {"/health/live", "/health/ready", "/metrics"}
    routes = [(r.path, sorted(r.methods)[0]) for r in gateway.app.routes if hasattr(r, "methods")]
    assert len(routes) > 8
    transport = httpx2.ASGITransport(app=gateway.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
        for path, method in routes:
            url = re.sub(r"\{[^}]*\}", "x", path)
            method = "POST" if method not in ("GET", "HEAD") else "GET"
            reply = await client.request(method, url, json=body() if method == "POST" else None)
            assert (reply.status_code == 401) == (path not in public), (path, reply.status_code)
    assert router.seen == []
    assert gateway.scripted("echo").calls == 0


async def test_pain_20_every_step_is_on_the_bill_and_the_steps_add_up(tmp_path: Path) -> None:
    """A draft that was thrown away cannot be found on the bill."""
    gateway = cascade(tmp_path)
    reply = (await post(gateway)).json()
    (record,) = gateway.records
    steps = [(s["expert"], s["verdict"], s["cost_micro_usd"]) for s in record["stages"]]
    assert [(expert, verdict) for expert, verdict, _ in steps] == [
        ("draft", "escalate"),
        ("final", "accept"),
    ]
    assert all(cost > 0 for *_, cost in steps)
    assert sum(cost for *_, cost in steps) == record["cost_micro_usd"]
    assert reply["coe"]["cost_usd"] == record["cost_micro_usd"] / 1e6
    spent = sum(value(gateway, "coe_cost_usd_total", expert=e) for e in ("draft", "final"))
    assert spent == pytest.approx(record["cost_micro_usd"] / 1e6)
    assert value(gateway, "coe_saved_usd") == pytest.approx(
        (record["dearest_micro_usd"] - record["cost_micro_usd"]) / 1e6
    )


async def test_pain_21_the_explanation_is_the_decision_that_serves(tmp_path: Path) -> None:
    """The test endpoint runs another classifier than the router."""
    gateway = cascade(tmp_path)
    explained = (await post(gateway, "/v1/route")).json()
    await post(gateway)
    record = gateway.records[-1]
    for part in ("category", "policy", "policy_digest", "plan", "excluded"):
        assert explained[part] == record[part], part


async def test_pain_18_a_gateway_that_cannot_serve_says_what_is_missing(tmp_path: Path) -> None:
    """Setting up takes an afternoon of guessing."""
    from gateway.app import Readiness, create_app

    gateway = make_gateway(tmp_path, [spec("echo")])

    async def unready() -> Readiness:
        return Readiness(missing={"hosts": "no expert host is registered"})

    app = create_app(gateway.service, metrics=gateway.metrics, readiness=unready)
    async with served(app) as url, httpx2.AsyncClient(base_url=url) as client:
        reply = await client.get("/health/ready")
    assert reply.status_code == 503
    assert reply.json()["missing"] == {"hosts": "no expert host is registered"}


@pytest.mark.parametrize(("lock", "at_least"), [("cpu.lock", 100), ("audit.lock", 20)])
def test_pain_26_nothing_is_installed_that_the_lock_does_not_name(lock: str, at_least: int) -> None:
    """A compromised release of a dependency of a dependency arrives over night."""
    lines = (ROOT / "requirements" / lock).read_text().splitlines()
    pins = [line for line in lines if line.strip() and not line.startswith("#")]
    assert len(pins) > at_least
    assert [
        pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+_-]+", pin)
    ] == []
    makefile = (ROOT / "Makefile").read_text()
    installs = [line for line in makefile.splitlines() if "pip install" in line]
    assert installs
    assert all("--no-deps" in line for line in installs)
    assert "requirements/audit.py --advisory" in makefile
    auditing = (ROOT / "requirements" / "audit.py").read_text()
    assert '"--no-deps", "-r", str(HERE / TOOL)' in auditing
