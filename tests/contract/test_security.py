"""What docs/security.md promises: no pickle, no secret in sight, no address of callers' choice."""

from __future__ import annotations

import ast
import json
import logging
from pathlib import Path
from typing import Any

import httpx2
import pytest

from experts.errors import AuthenticationFailed
from experts.types import SourceKind
from gateway.keys import Access
from gateway.telemetry import JsonFormatter, log_request
from tests.contract.gateway_kit import make_gateway, served, spec

ROOT = Path(__file__).parents[2]
PACKAGES = ("gateway", "deployments", "routers", "policies", "experts")
UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
SECRET = "coe-sk-" + "s3cr3tS3cr3t" * 3 + "abcdefg"


def suspects() -> list[tuple[Path, ast.AST]]:
    """Our modules that have one of the words at all; the others need no closer look."""
    files = [p for package in PACKAGES for p in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    words = (*UNSAFE, "torch.load", "yaml.", "eval(", "exec(")
    texts = [(path, path.read_text()) for path in files]
    return [(path, ast.parse(text)) for path, text in texts if any(w in text for w in words)]


def test_nothing_of_ours_reads_what_can_run_code() -> None:
    """No pickle module, no ``allow_pickle``, no unsafe ``torch.load``, no YAML that makes objects,
    no ``eval`` or ``exec``.
    """
    found: list[str] = []
    for path, tree in suspects():
        for node in ast.walk(tree):
            if problem := _unsafe(node):
                found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}: {problem}")
    assert found == []


def _unsafe(node: ast.AST) -> str | None:
    if isinstance(node, ast.Import):
        names = {alias.name.partition(".")[0] for alias in node.names}
        return ", ".join(names & UNSAFE) or None
    if isinstance(node, ast.ImportFrom):
        return node.module if (node.module or "").partition(".")[0] in UNSAFE else None
    if not isinstance(node, ast.Call):
        return None
    called = _called(node.func)
    given = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg in _TELLING}
    if given.get("allow_pickle", "False") != "False":
        return "allow_pickle"
    if called == "torch.load" and given.get("weights_only") != "True":
        return "torch.load without weights_only"
    if called in ("eval", "exec", "yaml.load", "yaml.full_load", "yaml.unsafe_load"):
        loader = given.get("Loader", "")
        return None if called == "yaml.load" and "Safe" in loader else called
    return None


_TELLING = ("allow_pickle", "weights_only", "Loader")


def _called(function: ast.expr) -> str:
    """``f`` or ``module.f``; empty for anything longer."""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        return f"{function.value.id}.{function.attr}"
    return function.id if isinstance(function, ast.Name) else ""


def test_the_check_above_finds_what_it_looks_for() -> None:
    for text in (
        "import pickle",
        "from joblib import load",
        "np.load(f, allow_pickle=True)",
        "torch.load(f)",
        "yaml.load(t, Loader=yaml.Loader)",
        "eval(x)",
    ):
        assert any(_unsafe(node) for node in ast.walk(ast.parse(text))), text


class Refusing:
    """A gate that quotes nothing of what it was sent."""

    async def authenticate(self, secret: str | None) -> Access:
        assert secret == SECRET
        raise AuthenticationFailed("no")

    async def settle(self, journal: Any) -> None:
        return None

    def close(self, journal: Any) -> None:
        return None


@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
@pytest.mark.parametrize("stream", [False, True])
async def test_no_key_shows_in_logs_errors_or_decisions(
    tmp_path: Path, header: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    remote = spec(
        "remote", "http://127.0.0.1:9/v1", kind=SourceKind.REMOTE, secret_env="UPSTREAM_KEY"
    )
    gateway = make_gateway(tmp_path, [spec("echo"), remote], gate=None)
    gateway.service._observers = (*gateway.service._observers, log_request)
    value = f"Bearer {SECRET}" if header == "authorization" else SECRET
    answers: list[str] = []
    async with served(gateway.app) as url, httpx2.AsyncClient(base_url=url) as client:
        for model in ("auto", "remote", "nobody"):  # answered, upstream away, refused
            body = {
                "model": model,
                "messages": [{"role": "user", "content": "hello"}],
                "stream": stream,
            }
            reply = await client.post("/v1/chat/completions", json=body, headers={header: value})
            answers += [reply.text, str(reply.headers)]
        gateway.service._gate = Refusing()  # type: ignore[assignment]
        reply = await client.post("/v1/chat/completions", json={}, headers={header: value})
        assert reply.status_code == 401
        answers += [reply.text, str(reply.headers)]
    await gateway.pool.aclose()
    lines = [JsonFormatter().format(record) for record in caplog.records]
    everything = "\n".join([*answers, *lines, json.dumps(gateway.records)])
    assert SECRET not in everything
    assert "sk-upstream" not in everything
    assert any('"event":"request_done"' in line for line in lines)


async def test_no_request_can_choose_an_address(tmp_path: Path) -> None:
    """Fields that other gateways take for one are the expert's business here, and it never sees
    another address than its own.
    """
    gateway = make_gateway(tmp_path, [spec("echo")])
    wishes = {
        "api_base": "http://evil.example",
        "base_url": "http://evil.example",
        "extra_headers": {"host": "evil.example"},
    }
    body = {"model": "echo", "messages": [{"role": "user", "content": "hello"}], **wishes}
    transport = httpx2.ASGITransport(app=gateway.app)
    headers = {"x-coe-host": "evil.example", "x-forwarded-host": "evil.example"}
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
        reply = await client.post("/v1/chat/completions", json=body, headers=headers)
        coe = await client.post("/v1/chat/completions", json=body | {"coe": {"url": "x"}})
    assert reply.status_code == 200
    assert reply.json()["model"] == "echo"
    assert gateway.scripted("echo").calls == 1
    assert coe.status_code == 400  # our own object takes nothing it does not know
