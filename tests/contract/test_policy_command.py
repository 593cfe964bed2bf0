"""``coe policy`` and ``coe decisions`` against a real store, as a person uses them."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deployments.embedded_valkey import EmbeddedValkey
from deployments.store import StateStore
from gateway.cli import app
from gateway.state.decisions import DecisionLog

pytestmark = pytest.mark.valkey

EXPERT = {
    "source": {"scripted": "echo"},
    "price": {"input_usd_per_mtok": 1, "output_usd_per_mtok": 2},
    "context_tokens": 4096,
}
POLICY = "version: 1\ndefault: small\ncaps: {cost_usd: 1.0}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "auto.yaml").write_text(POLICY)
    config = {"experts": {"small": EXPERT, "large": EXPERT}, "policies": {"dir": "policies"}}
    (tmp_path / "coe.yaml").write_text(json.dumps(config))
    (tmp_path / "large.yaml").write_text(POLICY.replace("small", "large"))
    monkeypatch.setenv("COE_CONFIG", str(tmp_path / "coe.yaml"))
    with EmbeddedValkey() as server:
        monkeypatch.setenv("COE_REDIS_URL", server.url)
        yield tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments], catch_exceptions=True)


def said(*arguments: str) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_a_version_goes_in_on_trial_and_back(folder: Path) -> None:
    file = str(folder / "large.yaml")
    assert "every policy follows its file" in said("policy", "list")
    active = said("policy", "activate", file, "--name", "auto")
    digest = active.split()[1]
    assert f"auto: {digest} is in force" in said("policy", "list")
    assert "the file's version is in force" in said("policy", "rollback", "auto")
    trial = said("policy", "canary", file, "--name", "auto", "--share", "0.05")
    assert trial == f"auto: {digest} for 5 % of sessions\n"
    assert "canary" not in said("policy", "canary", "--off", "--name", "auto")
    said("policy", "activate", file, "--name", "auto")
    assert "the file's version is in force" in said("policy", "release", "auto")


def test_what_cannot_be_done_is_said_and_changes_nothing(folder: Path) -> None:
    wrong = folder / "wrong.yaml"
    wrong.write_text(POLICY.replace("small", "nobody"))
    for arguments, words in (
        (("activate", str(wrong)), "there is no expert 'nobody'"),
        (("rollback", "auto"), "no earlier version"),
        (("canary", "--off"), "--off takes --name"),
        (("canary", str(folder / "large.yaml")), "--share"),
        (("activate", str(folder / "large.yaml"), "--name", "../x"), "does not match"),
    ):
        result = run("policy", *arguments)
        assert result.exit_code == 1
        assert words in str(result.exception), arguments
    assert "every policy follows its file" in said("policy", "list")


def test_the_tail_shows_the_last_decisions_oldest_first(folder: Path) -> None:
    async def write() -> None:
        store = StateStore(os.environ["COE_REDIS_URL"], timeout_ms=5_000)
        log = DecisionLog(store)
        for n in range(5):
            log.append(
                {
                    "decision_id": f"dec-{n}",
                    "at_ms": 1_000 * n,
                    "outcome": "ok",
                    "error": None,
                    "expert": "small",
                    "stages": [{"expert": "small", "verdict": "accept"}],
                    "category": "general",
                    "policy": "auto",
                    "total_ms": 12.3,
                    "cost_micro_usd": 42,
                }
            )
        await log.flush()
        await store.aclose()

    asyncio.run(write())
    lines = said("decisions", "tail", "-n", "2").splitlines()
    assert [line.split()[-1] for line in lines] == ["dec-3", "dec-4"]
    assert lines[1].split()[:3] == ["00:00:04", "ok", "small"]
    assert "$0.000042" in lines[1]
    records = [json.loads(x) for x in said("decisions", "tail", "--json").splitlines()]
    assert [r["decision_id"] for r in records] == [f"dec-{n}" for n in range(5)]
