"""``coe status`` against a real store, beside a gateway that only says it is up."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deployments.embedded_valkey import EmbeddedValkey
from deployments.host_record import HostRecord, PoolRecord
from deployments.registry import HostRegistry
from deployments.store import StateStore
from gateway.cli import app
from gateway.state.moves import MoveLog, MoveRecord

pytestmark = pytest.mark.valkey

CONFIG = """
gateway: {{port: {port}}}
experts:
  near:
    source: {{scripted: echo}}
    price: {{input_usd_per_mtok: 1.0, output_usd_per_mtok: 2.0}}
    context_tokens: 4096
  far:
    source: {{scripted: echo}}
    price: {{input_usd_per_mtok: 1.0, output_usd_per_mtok: 2.0}}
    context_tokens: 4096
policies: {{dir: policies}}
"""
POLICY = "version: 1\ndefault: near\ncaps: {cost_usd: 1.0}\n"
HOST = HostRecord(
    "h1",
    "http://127.0.0.1:1",
    ("far", "near"),
    resident="near",
    queue_depths={"far": 3},
    in_flight=2,
    out_of_service={"far": "digest differs"},
    pools=(PoolRecord("g", 4 << 30, 1 << 30, ("far", "near"), ("near",)),),
)


@pytest.fixture
def gateway() -> Iterator[int]:
    """The port of something that answers as a ready gateway does."""

    class Ready(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"status": "ok", "missing": {}, "degraded": {}}')

        def log_message(self, *_: Any) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def config(gateway: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "auto.yaml").write_text(POLICY)
    path = tmp_path / "coe.yaml"
    path.write_text(CONFIG.format(port=gateway))
    monkeypatch.delenv("COE_REDIS_URL", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "160")
    return path


def status(config: Path, *more: str) -> str:
    ran = CliRunner().invoke(app, ["status", "--config", str(config), *more])
    assert ran.exit_code == 0, (ran.output, ran.exception)
    return ran.output


async def publish(url: str) -> None:
    store, now_ms = StateStore(url, timeout_ms=5_000), int(time.time() * 1000)
    try:
        await HostRegistry(store).publish(HOST, ttl_ms=60_000)
        await MoveLog(store).append(
            MoveRecord(now_ms, "pool", "h1", "far", "refused", "no room", 12.0)
        )
    finally:
        await store.aclose()


def test_hosts_experts_and_moves_are_shown(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with EmbeddedValkey() as server:
        monkeypatch.setenv("COE_REDIS_URL", server.url)
        asyncio.run(publish(server.url))
        shown, report = status(config), json.loads(status(config, "--json", "-"))
    assert report["hosts"][0]["resident"] == "near"
    assert (report["hosts"][0]["running"], report["hosts"][0]["waiting"]) == (2, 3)
    assert report["hosts"][0]["pooled"] == ["near"]
    near, far = report["experts"]
    assert (near["resident_on"], far["resident_on"]) == (["h1"], [])
    assert far["waiting"] == 3
    assert far["out_of_service"] == {"h1": "digest differs"}
    assert report["moves"][0]["outcome"] == "refused"
    for words in ("1.0 of 4.0 GiB", "h1: digest differs", "pool far at h1: refused (no room)"):
        assert words in shown


def test_a_store_that_cannot_be_read_hides_nothing_else(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no `coe serve` runs with this file" in " ".join(status(config).split())
    monkeypatch.setenv("COE_REDIS_URL", "redis://127.0.0.1:9")
    report = json.loads(status(config, "--json", "-"))
    assert report["status"] == "ok"
    assert report["store"]
    assert "hosts" not in report


def test_an_address_given_by_hand_stands_beside_the_store_of_a_configuration(
    config: Path, gateway: int
) -> None:
    url = f"http://127.0.0.1:{gateway}"
    assert "store" in json.loads(status(config, "--url", url, "--json", "-"))
    alone = CliRunner().invoke(app, ["status", "--url", url, "--json", "-"])
    assert set(json.loads(alone.output)) == {"status", "missing", "degraded"}
