"""``coe serve`` and ``coe keys`` together: keys are found, honoured, and outlive a restart."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.integration.stack import ROOT, Stack, launch, wait_ready

pytestmark = pytest.mark.valkey

CONFIG = {
    "experts": {
        "echo": {
            "source": {"scripted": "echo"},
            "price": {"input_usd_per_mtok": 0, "output_usd_per_mtok": 2},
            "context_tokens": 4096,
        }
    },
    "policies": {"dir": "policies"},
    "state": {"timeout_ms": 5_000},
}
POLICY = "version: 1\ndefault: echo\ncaps: {cost_usd: 1.0}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "auto.yaml").write_text(POLICY)
    path = tmp_path / "coe.yaml"
    gateway = {"port": 0, "admin_port": 0, "require_keys": True, "workers": 2}
    path.write_text(yaml.safe_dump(CONFIG | {"gateway": gateway}))
    return path


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {
        "COE_CACHE_DIR": str(tmp_path / "cache"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }


def start(config: Path, environ: dict[str, str]) -> Stack:
    return wait_ready(launch(config, config.parent, environ))


@pytest.fixture
def stack(config: Path, environ: dict[str, str]) -> Iterator[Stack]:
    running = start(config, environ)
    yield running
    if running.process.poll() is None:
        running.stop(signal.SIGKILL)


def keys(
    config: Path, environ: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway.cli", "keys", *arguments, "--config", str(config)],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def keys_json(config: Path, environ: dict[str, str], *arguments: str) -> Any:
    done = keys(config, environ, *arguments, "--json", "-")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def status(stack: Stack, secret: str | None) -> int:
    headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
    body = {"model": "auto", "messages": [{"role": "user", "content": "one two"}], "max_tokens": 2}
    reply = httpx.post(f"{stack.url}/chat/completions", json=body, headers=headers, timeout=30)
    return reply.status_code


def test_keys_outlive_a_restart(stack: Stack, config: Path, environ: dict[str, str]) -> None:
    secret = keys_json(config, environ, "create", "--name", "n", "--budget-usd-total", "0.000008")[
        "secret"
    ]
    assert (status(stack, None), status(stack, secret)) == (401, 200)
    second = launch(config, config.parent / "policies", environ)
    assert second.process.wait(timeout=120) == 1
    assert "another `coe serve` runs" in second.text()

    assert stack.stop() == 0
    away = keys(config, environ, "list")
    assert away.returncode == 1
    assert "no `coe serve` runs with this file" in away.stderr

    again = start(config, environ)
    try:
        (key,) = keys_json(config, environ, "list")["keys"]
        assert key["spent_micro_usd"]["total"] == 4
        assert (status(again, secret), status(again, secret)) == (200, 402)
        keys_json(config, environ, "revoke", key["id"])
        assert status(again, secret) == 401
    finally:
        assert again.stop() == 0
    assert secret not in stack.text() + again.text()
