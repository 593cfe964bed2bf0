"""``coe keys`` against a real store, as a person uses it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from typer.testing import CliRunner, Result

from deployments.embedded_valkey import EmbeddedValkey
from gateway.ask import CommandFailed
from gateway.cli import app
from gateway.keys import digest_of
from gateway.run_files import noted_store

pytestmark = pytest.mark.valkey

CONFIG = """
experts:
  echo:
    source: {scripted: echo}
    price: {input_usd_per_mtok: 1.0, output_usd_per_mtok: 2.0}
    context_tokens: 4096
policies: {dir: policies}
"""
POLICY = "version: 1\ndefault: echo\ncaps: {cost_usd: 1.0}\n"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "auto.yaml").write_text(POLICY)
    path = tmp_path / "coe.yaml"
    path.write_text(CONFIG)
    monkeypatch.setenv("COE_CONFIG", str(path))
    monkeypatch.setenv("COE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("COE_REDIS_URL", raising=False)
    return path


@pytest.fixture
def own_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of this test alone: the command's namespace is the real one."""
    with EmbeddedValkey() as server:
        monkeypatch.setenv("COE_REDIS_URL", server.url)
        yield server.url


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["keys", *arguments], catch_exceptions=True)


def done(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def as_json(*arguments: str) -> Any:
    return json.loads(done(*arguments, "--json", "-"))


def test_create_list_revoke(config: Path, own_store: str, tmp_path: Path) -> None:
    assert "no keys yet" in done("list")
    said = done(
        *("create", "--name", "team a", "--budget-usd-day", "2.5", "--rpm", "60"),
        *("--tpm", "1000", "--concurrency", "4", "--policy", "auto", "--expert", "echo"),
    )
    secret = re.search(r"coe-sk-\S{43}", said)
    assert secret is not None
    (key,) = as_json("list")["keys"]
    assert key["limits"] == {
        "requests_per_minute": 60,
        "tokens_per_minute": 1000,
        "concurrent_requests": 4,
    }
    assert key["budgets_micro_usd"]["day"] == 2_500_000
    assert (key["policies"], key["experts"], key["revoked_ms"]) == (["auto"], ["echo"], None)
    assert key["spent_micro_usd"] == {"hour": 0, "day": 0, "month": 0, "total": 0}
    table = done("list")
    assert key["id"] in table
    assert "2.5 USD a day" in table
    assert secret[0] not in table
    with redis.Redis.from_url(own_store) as client:
        (record,) = client.scan_iter("coe:key:*:record")
        assert digest_of(secret[0]) in record.decode()
        assert secret[0].encode() not in str(client.hgetall(record)).encode()
    assert "is revoked" in done("revoke", key["id"])
    assert as_json("list")["keys"][0]["revoked_ms"] > 0
    assert "revoked 20" in done("list")


def test_the_secret_s_file_is_for_its_owner_alone(
    config: Path, own_store: str, tmp_path: Path
) -> None:
    target = tmp_path / "key.json"
    target.touch(0o644)
    done("create", "--name", "n", "--json", str(target))
    assert target.stat().st_mode & 0o777 == 0o600
    assert json.loads(target.read_text())["secret"].startswith("coe-sk-")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "--name", "n", "--expert", "ecko"), "no expert 'ecko'; known are echo"),
        (("create", "--name", "n", "--policy", "cheap"), "no policy 'cheap'; known are auto"),
        (("create", "--name", ""), "printable characters"),
        (("revoke", "key-none"), "there is no key 'key-none'"),
    ],
)
def test_what_makes_no_sense_is_said(
    config: Path, own_store: str, arguments: tuple[str, ...], said: str
) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, CommandFailed)
    assert said in str(result.exception)
    assert as_json("list")["keys"] == []


@pytest.mark.parametrize("option", [("--rpm", "0"), ("--budget-usd-day", "-1")])
def test_bounds_of_the_options(config: Path, own_store: str, option: tuple[str, str]) -> None:
    assert run("create", "--name", "n", *option).exit_code == 2


def test_without_any_store_it_says_so(config: Path) -> None:
    result = run("list")
    assert isinstance(result.exception, CommandFailed)
    assert "no `coe serve` runs with this file" in str(result.exception)
    assert "state.redis_url" in str(result.exception)


def test_the_running_serve_s_store_is_found(config: Path, tmp_path: Path) -> None:
    environ = {"COE_CACHE_DIR": str(tmp_path / "cache")}
    with EmbeddedValkey() as server, noted_store(config, server.url, environ):
        done("create", "--name", "n")
        assert [key["name"] for key in as_json("list")["keys"]] == ["n"]
