"""``coe``'s commands as a person runs them: what they print, where, and with which status."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from gateway import cli
from routers.artifact import load_artifact
from routers.outcomes import read_outcomes

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
experts:
  general:
    source: {scripted: echo}
    price: {input_usd_per_mtok: 0.1, output_usd_per_mtok: 0.2}
    context_tokens: 4096
  sql:
    source: {scripted: echo}
    price: {input_usd_per_mtok: 0.1, output_usd_per_mtok: 0.2}
    context_tokens: 4096
policies: {dir: policies}
gateway: {port: %d}
"""
POLICY = """
version: 1
default: general
routes: {sql: sql}
caps: {stages: 1, cost_usd: 1.0, deadline_ms: 60000}
max_output_tokens_default: 64
"""


class Ran:
    """What a command left: exit status, standard output, standard error."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    def sentence(self) -> str:
        """The error, which has to be one line on standard error and nothing else."""
        assert self.status == 1, (self.status, self.out, self.err)
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("coe: ")
        return line


class Terminal:
    """Runs ``coe`` through its real entry point, which is what turns errors into sentences."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: object) -> Ran:
        self._monkeypatch.setattr("sys.argv", ["coe", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = self._capsys.readouterr()
        return Ran(int(ended.value.code or 0), captured.out, captured.err)


@pytest.fixture
def coe(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Terminal:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("http_proxy", "http://192.0.2.1:9")  # must not be asked about ourselves
    return Terminal(monkeypatch, capsys)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of scripted experts whose gateway does not run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "auto.yaml").write_text(POLICY)
    path = tmp_path / "coe.yaml"
    path.write_text(CONFIG % port)
    return path


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    """A server on this machine that gives one answer to everything."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            return

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


# --- help -----------------------------------------------------------------------------------------


def commands(group: Any = cli.app, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    own = [(*prefix, c.name or c.callback.__name__) for c in group.registered_commands]
    for sub in group.registered_groups:
        own += commands(sub.typer_instance, (*prefix, sub.name))
    return own


def test_the_promised_commands_are_there() -> None:
    assert {
        ("serve",),
        ("route",),
        ("train",),
        ("status",),
        ("batch",),
        ("config", "check"),
        ("config", "schema"),
        ("policy", "check"),
        ("policy", "schema"),
        ("policy", "diff"),
    } <= set(commands())


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_says_what_it_does_and_every_option_has_a_text(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(cli.app, [*path, "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
    assert shown.exit_code == 0
    lines = [line.strip("│╭╰─ ") for line in shown.output.splitlines() if line.strip("│╭╰─ ")]
    assert lines[1].endswith(".") or lines[2].endswith("."), lines[:3]
    for line in lines:
        if line.startswith("--") and not line.startswith("--help"):
            assert len(line.split("  ")) > 1, f"no text: {line}"


def test_a_wrong_command_line_is_status_2(coe: Terminal) -> None:
    for arguments in (("rout", "x"), ("route",), ("serve", "--workers", "0"), ("train",)):
        assert coe(*arguments).status == 2


# --- configuration and policies -------------------------------------------------------------------


def test_config_check_says_what_it_found(coe: Terminal, config: Path) -> None:
    ran = coe("config", "check", config)
    assert (ran.status, ran.err) == (0, "")
    assert f"{config}: in order" in ran.out
    assert "general, sql" in ran.out
    assert "auto" in ran.out


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("gateway:", "gatewy:", ["coe.yaml:12", "gatewy", "Did you mean 'gateway'?"]),
        ("context_tokens: 4096", "context_token: 4096", ["coe.yaml:6", "'context_tokens'?"]),
        ("context_tokens: 4096", "context_tokens: much", ["coe.yaml:6", "context_tokens"]),
        ("scripted: echo", "scripted: parrot", ["coe.yaml:4", "parrot"]),
        ("experts:", "experts: [", ["coe.yaml"]),
    ],
)
def test_a_mistake_in_the_configuration_is_named_by_file_line_and_key(
    coe: Terminal, config: Path, before: str, after: str, words: list[str]
) -> None:
    config.write_text(config.read_text().replace(before, after, 1))
    said = coe("config", "check", config).sentence()
    for word in words:
        assert word in said


@pytest.mark.parametrize("command", [("config", "check"), ("route", "x", "--config")])
def test_a_configuration_that_is_not_there_is_a_sentence(
    coe: Terminal, tmp_path: Path, command: tuple[str, ...]
) -> None:
    assert "nowhere.yaml" in coe(*command, tmp_path / "nowhere.yaml").sentence()


def test_policy_check_goes_through_all_files_and_fails_for_one(coe: Terminal, config: Path) -> None:
    good, bad = config.parent / "policies" / "auto.yaml", config.parent / "bad.yaml"
    bad.write_text(POLICY.replace("routes: {sql: sql}", "routes: {sql: sqll}"))
    ran = coe("policy", "check", bad, good, "--config", config)
    assert ran.status == 1
    assert "bad.yaml:4" in ran.err
    assert "Did you mean 'sql'?" in ran.err
    assert "auto.yaml: in order (digest " in ran.out
    assert coe("policy", "check", good, "--config", config).status == 0


def test_shipped_policies_fit_the_quickstart(coe: Terminal) -> None:
    quickstart = ROOT / "examples" / "quickstart" / "coe.yaml"
    shipped = sorted((ROOT / "policies").glob("*.yaml"))
    assert shipped
    ran = coe("policy", "check", *shipped, "--config", quickstart)
    assert (ran.status, ran.err) == (0, "")


def test_policy_diff_shows_the_lines_and_says_so_by_its_status(coe: Terminal, config: Path) -> None:
    old, new = config.parent / "policies" / "auto.yaml", config.parent / "new.yaml"
    new.write_text(POLICY.replace("cost_usd: 1.0", "cost_usd: 2.0"))
    assert coe("policy", "diff", old, old).out == "no difference\n"
    ran = coe("policy", "diff", old, new)
    assert ran.status == 1
    changed = [line for line in ran.out.splitlines() if line[:1] in "+-" and line[1:2] not in "+-"]
    assert len(changed) == 2


@pytest.mark.parametrize("kind", ["policy", "config"])
def test_schemas_are_valid_and_accept_what_we_ship(coe: Terminal, kind: str, config: Path) -> None:
    ran = coe(kind, "schema")
    assert (ran.status, ran.err) == (0, "")
    schema = json.loads(ran.out)
    validator = jsonschema.validators.validator_for(schema)
    assert schema["$schema"] == validator.META_SCHEMA["$id"]
    validator.check_schema(schema)
    files = [ROOT / "examples" / "quickstart" / "coe.yaml", config]
    if kind == "policy":
        files = sorted((ROOT / "policies").glob("*.yaml"))
    for file in files:
        validator(schema).validate(yaml.safe_load(file.read_text()))
    with pytest.raises(jsonschema.ValidationError):
        validator(schema).validate({"version": 1, "unheard_of": True})


# --- asking a gateway -----------------------------------------------------------------------------


def test_route_decides_here_when_no_gateway_runs(coe: Terminal, config: Path) -> None:
    ran = coe("route", "SELECT the names of all customers", "--config", config, "--json", "-")
    assert (ran.status, ran.err) == (0, "")
    told = json.loads(ran.out)
    assert told["live"] is False
    assert {stage["expert"] for stage in told["plan"]["stages"]} <= {"general", "sql"}
    assert sum(told["router"]["posterior"].values()) == pytest.approx(1, abs=1e-3)
    shown = coe("route", "SELECT the names of all customers", "--config", config)
    assert "no gateway is running" in shown.out
    assert f"category  {told['category']}" in shown.out


def test_route_with_an_unknown_policy_names_those_there_are(coe: Terminal, config: Path) -> None:
    said = coe("route", "x", "--policy", "cheapest", "--config", config).sentence()
    assert "cheapest" in said
    assert "auto" in said


@pytest.mark.parametrize("command", [("status",), ("route", "x")])
def test_nobody_listening_is_said_with_the_remedy(
    coe: Terminal, config: Path, command: tuple[str, ...]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        said = coe(*command, "--url", address).sentence()
    assert f"no gateway answers at {address}" in said
    assert "coe serve" in said


def test_status_asks_the_address_of_the_configuration(coe: Terminal, config: Path) -> None:
    port = yaml.safe_load(config.read_text())["gateway"]["port"]
    assert f"http://127.0.0.1:{port}" in coe("status", "--config", config).sentence()


@pytest.mark.parametrize(
    ("report", "status"),
    [
        ({"status": "ok", "missing": {}, "degraded": {}}, 0),
        ({"status": "degraded", "missing": {}, "degraded": {"state": "away"}}, 0),
        ({"status": "missing", "missing": {"hosts": "none"}, "degraded": {}}, 1),
    ],
)
def test_status_shows_the_report_and_its_verdict(
    coe: Terminal, report: dict[str, Any], status: int
) -> None:
    with answering(503 if status else 200, json.dumps(report).encode()) as url:
        ran = coe("status", "--url", f"{url}/v1/")
        as_json = coe("status", "--url", url, "--json", "-")
    assert (ran.status, as_json.status) == (status, status)
    assert f"{url}: {report['status']}" in ran.out
    assert json.loads(as_json.out) == report


@pytest.mark.parametrize("command", [("status",), ("route", "x")])
@pytest.mark.parametrize(
    ("status", "body"),
    [(404, b"<html>not found</html>"), (200, b"[]"), (200, b""), (404, b'{"detail": "no"}')],
)
def test_an_address_where_something_else_answers_is_a_sentence(
    coe: Terminal, command: tuple[str, ...], status: int, body: bytes
) -> None:
    with answering(status, body) as url:
        assert "is not a gateway" in coe(*command, "--url", url).sentence()


def test_a_gateways_refusal_is_passed_on(coe: Terminal) -> None:
    with answering(404, b'{"error": {"message": "no policy or expert"}}') as url:
        assert coe("route", "x", "--url", url).sentence() == "coe: no policy or expert"


@pytest.mark.parametrize("url", ["localhost:8000", "8000", "ftp://host", "http://"])
def test_an_address_that_is_none_is_a_sentence(coe: Terminal, url: str) -> None:
    assert "is not an address" in coe("status", "--url", url).sentence()


def test_a_result_that_cannot_be_written_is_a_sentence(coe: Terminal, tmp_path: Path) -> None:
    with answering(200, b'{"status": "ok"}') as url:
        target = tmp_path / "no" / "such" / "folder.json"
        assert str(target) in coe("status", "--url", url, "--json", target).sentence()


# --- training -------------------------------------------------------------------------------------


def rows(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_training_on_too_little_says_how_much_is_needed(coe: Terminal, tmp_path: Path) -> None:
    data = rows(
        tmp_path / "few.jsonl",
        {"prompt": "add 2 and 2", "category": "math"},
        {"prompt": "SELECT 1", "category": "sql"},
    )
    ran = coe("train", "--data", data, "--out", tmp_path / "artifact")
    assert ran.status == 1
    assert "few.jsonl" in ran.err
    assert "Traceback" not in ran.err
    assert any(number in ran.err for number in map(str, range(2, 101)))
    assert not (tmp_path / "artifact").exists()


@pytest.mark.parametrize("line", ["{", "[]", '{"prompt": 5, "category": "a"}', '{"prompt": "x"}'])
def test_a_training_row_that_cannot_be_read_is_named(
    coe: Terminal, tmp_path: Path, line: str
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(f'{{"prompt": "fine", "category": "a"}}\n{line}\n')
    ran = coe("train", "--data", data, "--out", tmp_path / "artifact")
    assert ran.status == 1
    assert "rows.jsonl" in ran.err
    assert "2" in ran.err
    assert "Traceback" not in ran.err


def test_training_blends_in_what_callers_said(coe: Terminal, tmp_path: Path) -> None:
    """The command itself: an exported file in, an artifact of the blended table out."""
    data, said = tmp_path / "data", tmp_path / "said.parquet"
    data.mkdir()
    prompts = [f"add {n} and {n + 1}" if n % 2 else f"SELECT {n} FROM t" for n in range(100)]
    queries = [{"query_id": f"q{n}", "prompt": prompt} for n, prompt in enumerate(prompts)]
    recorded = [
        {"query_id": f"q{n}", "expert": expert, "score": float(n % 2 == number), "cost": 0.1}
        for n in range(100)
        for number, expert in enumerate(("sql", "math"))
    ]
    pq.write_table(pa.Table.from_pylist(queries), data / "queries.parquet")
    pq.write_table(pa.Table.from_pylist(recorded), data / "outcomes.parquet")
    liked = {"expert": "sql", "score": 1.0}
    digests = [hashlib.sha256(prompt.encode()).hexdigest() for prompt in prompts[1:7:2]]
    rows_said = [liked | {"input_sha256": digest} for digest in (*digests, "0" * 64)]
    pq.write_table(pa.Table.from_pylist(rows_said), said)
    out = tmp_path / "artifact"
    ran = coe("train", "--data", data, "--out", out, "--feedback", said, "--json", "-")
    assert ran.status == 0, ran.err
    result = json.loads(ran.out)
    assert result["feedback"] == {
        "rows_used": 3,
        "scores_changed": 3,
        "rows_of_unknown_queries": 1,
        "rows_of_unknown_experts": 0,
    }
    assert result["data_digest"] != read_outcomes(data).digest, "trained on other scores"
    assert load_artifact(out).digest == result["artifact_digest"]
    missing = coe("train", "--data", data, "--out", tmp_path / "x", "--feedback", tmp_path / "no")
    assert missing.status == 1
    assert "Traceback" not in missing.err


def test_training_data_that_is_not_there_is_a_sentence(coe: Terminal, tmp_path: Path) -> None:
    ran = coe("train", "--data", tmp_path / "none", "--out", tmp_path / "artifact")
    assert ran.status == 1
    assert str(tmp_path / "none") in ran.err
    assert "Traceback" not in ran.err
