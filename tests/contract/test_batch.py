"""``coe batch`` against a real gateway: order, resuming after a kill, trouble on the way."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from experts.types import ExpertSpec
from gateway.batch import BatchOptions, Stop, Summary, run_batch
from gateway.batch_client import GatewayAddress
from gateway.batch_files import BatchError, InputFile, OutputFile
from gateway.batch_plan import RetryRule
from policies.types import Candidate
from tests.contract.gateway_kit import (
    PLAIN_POLICY,
    FixedRouter,
    Gateway,
    eventually,
    make_gateway,
    served,
    server_of,
    spec,
)

POLICY = PLAIN_POLICY.replace(
    "default: echo", "routes: {sql: select, maths: sum}\ndefault: general\n"
)
ROUTER = {"SELECT": "sql", "SUM": "maths"}
SLOW = "tokens?count=1&delay_ms=40"


@pytest.fixture
def gateway(tmp_path: Path) -> Gateway:
    return _gateway(tmp_path, [spec("general"), spec("select"), spec("sum"), spec("own")])


@pytest.fixture
def slow_gateway(tmp_path: Path) -> Gateway:
    names = ("general", "select", "sum", "own")
    return _gateway(tmp_path, [spec(name, SLOW) for name in names])


def _gateway(folder: Path, specs: list[ExpertSpec]) -> Gateway:
    policies = folder / "policies"
    policies.mkdir()
    return make_gateway(policies, specs, policies={"auto": POLICY}, router=FixedRouter(ROUTER))


def line(custom_id: str, words: str, model: str = "auto", **changes: Any) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": f"{words} {custom_id}"}]}
    return {
        "custom_id": custom_id,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": body,
    } | changes


def mixed(count: int) -> list[dict[str, Any]]:
    """Alternating between three experts, the worst case for swapping."""
    words = ("SELECT", "SUM", "hello", "SUM")
    return [line(f"q{n}", words[n % 4]) for n in range(count)]


def write(path: Path, lines: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    raw = path.read_bytes()
    assert raw.endswith(b"\n")
    return [json.loads(entry) for entry in raw.splitlines()]


class Unwatched:
    def routing(self, done: int, total: int) -> None: ...

    def sending(self, expert: str | None, done: int, total: int) -> None: ...


async def run(
    folder: Path, url: str, *, stop: Stop | None = None, watch: Any = None, **changes: Any
) -> Summary:
    options = BatchOptions(
        GatewayAddress(url), concurrency=4, retry=RetryRule(attempts=4, base_s=0.001)
    )
    with (
        InputFile(folder / "in.jsonl") as source,
        OutputFile(folder / "out.jsonl") as target,
    ):
        return await run_batch(
            source,
            target,
            replace(options, **changes),
            stop=stop or Stop(),
            watch=watch or Unwatched(),
            draw=lambda: 0.5,
        )


def asked(gateway: Gateway) -> Counter[str]:
    """How often an answer was asked for, by the line's name; routing is not counted."""
    return Counter(
        journal.request.routing_text.split()[-1]
        for journal in gateway.journals
        if journal.request is not None and journal.endpoint != "route"
    )


# --- order ---------------------------------------------------------------------------------------


async def test_each_expert_is_loaded_once(tmp_path: Path, gateway: Gateway) -> None:
    lines = [*mixed(24), line("own1", "SELECT", "own"), line("own2", "SUM", "own")]
    write(tmp_path / "in.jsonl", lines)
    gateway.pool.candidate = lambda spec: Candidate(spec, resident=spec.id == "general")  # type: ignore[method-assign]
    async with served(gateway.app) as url:
        summary = await run(tmp_path, url)
    order = [entry["response"]["body"]["model"] for entry in read(tmp_path / "out.jsonl")]
    assert order == ["general"] * 6 + ["sum"] * 12 + ["select"] * 6 + ["own"] * 2
    assert [g.expert for g in summary.groups if g.resident] == ["general"]
    assert (summary.changes_input_order, summary.changes_run_order) == (24, 3)
    assert (summary.swaps_avoided, summary.served_by_another, summary.answered) == (21, 0, 26)
    assert summary.routed == 24  # a line that names its expert needs no routing
    assert all(journal.request.model == "auto" for journal in gateway.journals[:24])


async def test_inside_a_group_lines_go_in_input_order(tmp_path: Path, gateway: Gateway) -> None:
    write(tmp_path / "in.jsonl", mixed(12))
    async with served(gateway.app) as url:
        await run(tmp_path, url, concurrency=1)
    names = [entry["custom_id"] for entry in read(tmp_path / "out.jsonl")]
    assert names == ["q1", "q3", "q5", "q7", "q9", "q11", "q0", "q4", "q8", "q2", "q6", "q10"]


async def test_output_is_openais_and_the_summary_adds_up(tmp_path: Path, gateway: Gateway) -> None:
    text = {"model": "own", "prompt": "one two"}
    write(
        tmp_path / "in.jsonl",
        [
            line("chat", "hello"),
            line("text", "", url="/v1/completions", body=text),
            line("nobody", "hello", "no-such-model"),
        ],
    )
    async with served(gateway.app) as url:
        summary = await run(tmp_path, url)
    entries = {entry["custom_id"]: entry for entry in read(tmp_path / "out.jsonl")}
    chat, text_entry, refused = (entries[name] for name in ("chat", "text", "nobody"))
    assert set(chat) == {"id", "custom_id", "response", "error"}
    assert chat["id"].startswith("batch_req_")
    assert (chat["response"]["status_code"], chat["error"]) == (200, None)
    assert chat["response"]["request_id"] == chat["id"]
    assert chat["response"]["body"]["choices"][0]["message"]["content"] == "hello chat"
    assert text_entry["response"]["body"]["choices"][0]["text"] == "one two"
    assert refused["response"]["status_code"] == 404
    assert refused["response"]["body"]["error"]["code"] == "model_not_found"
    whole = summary.as_json()
    assert (whole["answered"], whole["failed"], whole["left"]) == (2, 1, 0)
    assert whole["experts"]["own"] == {
        "lines": 1,
        "failed": 0,
        "input_tokens": 2,
        "output_tokens": 2,
        "cost_micro_usd": 2 * 1 + 2 * 2,
    }


# --- stopping and resuming -----------------------------------------------------------------------


@asynccontextmanager
async def command(folder: Path, url: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """``coe batch`` as users run it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-m", "gateway.cli", "batch"),
        *(str(folder / "in.jsonl"), str(folder / "out.jsonl")),
        *("--url", url, "--concurrency", "4", "--json", str(folder / "summary.json")),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "NO_COLOR": "1"},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


async def test_a_kill_repeats_only_what_was_in_flight(
    tmp_path: Path, slow_gateway: Gateway
) -> None:
    """SIGKILL in mid-run, a torn line on top, then the same command again."""
    write(tmp_path / "in.jsonl", mixed(80))
    out = tmp_path / "out.jsonl"
    async with server_of(slow_gateway.app) as (url, server):
        async with command(tmp_path, url) as process:
            await eventually(lambda: lines_in(out) >= 20, within_s=60)
            process.send_signal(signal.SIGKILL)
            assert await process.wait() == -signal.SIGKILL
        recorded = {entry["custom_id"] for entry in read(out)}
        assert 20 <= len(recorded) < 80
        await eventually(server.at_rest)  # also what it sent in its last moment
        before = asked(slow_gateway)
        with out.open("ab") as file:
            file.write(b'{"id":"batch_req_77","custom_id":"q7","resp')
        async with command(tmp_path, url) as process:
            stdout, stderr = await process.communicate()
            assert process.returncode == 0, stderr.decode()
    assert b"swaps avoided" in stdout
    names = [entry["custom_id"] for entry in read(out)]
    assert len(names) == 80
    assert set(names) == {f"q{n}" for n in range(80)}
    calls = asked(slow_gateway)
    assert all(calls[name] == 1 for name in recorded)
    repeated = {name for name, count in calls.items() if count > 1}
    assert repeated <= set(before) - recorded
    assert len(repeated) <= 4
    assert max(calls.values()) <= 2
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["done_before"], summary["left"]) == (len(recorded), 0)
    assert summary["total"]["lines"] == 80
    assert summary["cut_bytes"] > 0


async def test_ctrl_c_writes_what_is_in_flight(tmp_path: Path, slow_gateway: Gateway) -> None:
    write(tmp_path / "in.jsonl", mixed(80))
    out = tmp_path / "out.jsonl"
    async with served(slow_gateway.app) as url, command(tmp_path, url) as process:
        await eventually(lambda: lines_in(out) >= 8, within_s=60)
        process.send_signal(signal.SIGINT)
        stdout, stderr = await process.communicate()
        assert process.returncode == 130, stderr.decode()
    assert b"run the same command again" in stdout
    names = [entry["custom_id"] for entry in read(out)]
    assert 8 <= len(names) < 80
    assert Counter(names) == asked(slow_gateway)  # every call's answer was kept
    assert all(backend.cancelled == 0 for backend in map(slow_gateway.scripted, ("sum", "select")))


async def test_a_second_stop_does_not_wait(tmp_path: Path) -> None:
    gateway = _gateway(
        tmp_path, [spec(n, "tokens?delay_ms=600000") for n in ("general", "select", "sum")]
    )
    write(tmp_path / "in.jsonl", mixed(8))
    stop = Stop()
    async with served(gateway.app) as url, asyncio.timeout(20):
        task = asyncio.create_task(run(tmp_path, url, stop=stop, grace_s=600.0))
        await eventually(lambda: gateway.scripted("sum").calls == 4)
        stop.ask()
        stop.ask()
        summary = await task
        await eventually(lambda: gateway.scripted("sum").cancelled == 4)
    assert summary.stopped
    assert summary.left == 8
    assert (tmp_path / "out.jsonl").read_bytes() == b""


async def test_a_stop_does_not_wait_for_retries(tmp_path: Path, gateway: Gateway) -> None:
    write(tmp_path / "in.jsonl", [line("a", "hello")])
    app = Trouble(gateway.app, [refuse(503, retry_after="100")])
    stop = Stop()
    async with served(app) as url, asyncio.timeout(20):
        task = asyncio.create_task(run(tmp_path, url, stop=stop, grace_s=600.0))
        await eventually(lambda: app.calls == 1)
        stop.ask()
        summary = await task
    assert (summary.stopped, summary.left, app.calls) == (True, 1, 1)
    assert (tmp_path / "out.jsonl").read_bytes() == b""


async def test_a_finished_batch_asks_nothing(tmp_path: Path, gateway: Gateway) -> None:
    write(tmp_path / "in.jsonl", mixed(4))
    async with served(gateway.app) as url:
        await run(tmp_path, url)
        journals, content = len(gateway.journals), (tmp_path / "out.jsonl").read_bytes()
        summary = await run(tmp_path, url)
    assert len(gateway.journals) == journals
    assert (tmp_path / "out.jsonl").read_bytes() == content
    assert (summary.done_before, summary.answered, summary.left) == (4, 0, 0)


# --- trouble -------------------------------------------------------------------------------------

Act = Callable[[Send], Awaitable[None]]


class Trouble:
    """Stands before the gateway and answers the first calls of an endpoint itself."""

    def __init__(self, app: ASGIApp, acts: Iterable[Act], path: str = "/v1/chat/completions"):
        self._app = app
        self._acts = list(acts)
        self._path = path
        self.calls = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == self._path:
            self.calls += 1
            if self._acts:
                await self._acts.pop(0)(send)
                return
        await self._app(scope, receive, send)


def refuse(status: int, **headers: str) -> Act:
    async def act(send: Send) -> None:
        named = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": named})
        body = b'{"error":{"message":"not now","code":"busy"}}'
        await send({"type": "http.response.body", "body": body})

    return act


async def too_busy(send: Send) -> None:
    """What a host answers whose queue is longer than it lets anybody wait."""
    headers = [(b"retry-after", b"0")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    body = b'{"error":{"message":"not now","code":"deadline_unreachable"}}'
    await send({"type": "http.response.body", "body": body})


async def cut_off(send: Send) -> None:
    """The connection ends in the middle of an answer."""
    headers = [(b"content-length", b"1000")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"id":', "more_body": True})
    raise ConnectionAbortedError


async def test_passing_trouble_leaves_no_trace(tmp_path: Path, gateway: Gateway) -> None:
    write(tmp_path / "in.jsonl", [line("a", "hello")])
    app = Trouble(gateway.app, [refuse(503, retry_after="0"), refuse(429), cut_off])
    async with served(app) as url:
        summary = await run(tmp_path, url)
    assert app.calls == 4
    assert (summary.answered, summary.failed) == (1, 0)
    assert [entry["custom_id"] for entry in read(tmp_path / "out.jsonl")] == ["a"]


async def test_a_busy_host_is_asked_until_it_has_time(tmp_path: Path, gateway: Gateway) -> None:
    """More often than the attempts that an error has: a refusal for want of time is none."""
    write(tmp_path / "in.jsonl", [line("a", "hello")])
    app = Trouble(gateway.app, [too_busy] * 20)
    async with served(app) as url:
        summary = await run(tmp_path, url)
    assert (app.calls, summary.answered, summary.failed) == (21, 1, 0)


async def test_a_line_s_own_deadline_is_no_reason_to_ask_for_ever(
    tmp_path: Path, gateway: Gateway
) -> None:
    entry = line("a", "hello")
    entry["body"]["coe"] = {"deadline_ms": 60_000}
    write(tmp_path / "in.jsonl", [entry])
    app = Trouble(gateway.app, [too_busy] * 20)
    async with served(app) as url:
        summary = await run(tmp_path, url)
    assert (app.calls, summary.answered, summary.failed) == (4, 0, 1)


async def test_exhausted_retries_end_in_the_errors_body(tmp_path: Path, gateway: Gateway) -> None:
    write(tmp_path / "in.jsonl", [line("a", "hello"), line("b", "hello")])
    app = Trouble(gateway.app, [refuse(503)] * 4)
    async with served(app) as url:
        summary = await run(tmp_path, url, concurrency=1)
    first, second = read(tmp_path / "out.jsonl")
    assert first["response"]["status_code"] == 503
    assert first["response"]["body"]["error"]["message"] == "not now"
    assert second["response"]["status_code"] == 200
    assert (app.calls, summary.answered, summary.failed) == (5, 1, 1)


async def test_a_line_that_breaks_every_connection_is_given_up(
    tmp_path: Path, gateway: Gateway
) -> None:
    write(tmp_path / "in.jsonl", [line("a", "hello"), line("b", "hello")])
    async with served(Trouble(gateway.app, [cut_off] * 4)) as url:
        await run(tmp_path, url, concurrency=1)
    first, second = read(tmp_path / "out.jsonl")
    assert (first["response"], first["error"]["code"]) == (None, "connection_lost")
    assert second["response"]["status_code"] == 200


async def test_what_the_gateway_calls_paid_is_not_repeated(
    tmp_path: Path, gateway: Gateway
) -> None:
    write(tmp_path / "in.jsonl", [line("a", "hello")])
    paid = refuse(502, x_should_retry="false", x_coe_cost_usd="0.000020", x_coe_expert="general")
    app = Trouble(gateway.app, [paid])
    async with served(app) as url:
        summary = await run(tmp_path, url)
    assert app.calls == 1
    assert summary.tally.experts["general"].cost_micro_usd == 20
    assert read(tmp_path / "out.jsonl")[0]["coe"] == {"expert": "general", "cost_usd": 0.00002}


async def test_trouble_while_routing_only_costs_the_grouping(
    tmp_path: Path, gateway: Gateway
) -> None:
    write(tmp_path / "in.jsonl", [line("a", "SUM"), line("b", "SELECT")])
    app = Trouble(gateway.app, [refuse(503)] * 3, path="/v1/route")
    async with served(app) as url:
        summary = await run(tmp_path, url, concurrency=1)
    assert [g.expert for g in summary.groups] == ["select", None]
    assert [entry["custom_id"] for entry in read(tmp_path / "out.jsonl")] == ["b", "a"]
    assert summary.answered == 2


async def test_a_gateway_that_goes_away_blames_no_line(
    tmp_path: Path, slow_gateway: Gateway
) -> None:
    """The run ends with an error, what is written stays, and the next run does the rest."""
    write(tmp_path / "in.jsonl", mixed(60))
    out = tmp_path / "out.jsonl"
    async with served(slow_gateway.app) as url:
        task = asyncio.create_task(run(tmp_path, url))
        await eventually(lambda: lines_in(out) >= 4)
    with pytest.raises(BatchError, match="no gateway answers"):
        await task
    kept = read(out)
    assert 4 <= len(kept) < 60
    assert all(entry["response"]["status_code"] == 200 for entry in kept)
    async with served(slow_gateway.app) as url:
        summary = await run(tmp_path, url)
    assert (summary.done_before, summary.left) == (len(kept), 0)
    assert max(asked(slow_gateway).values()) <= 2


async def test_a_refused_key_ends_the_run(tmp_path: Path, gateway: Gateway) -> None:
    write(tmp_path / "in.jsonl", [line("a", "hello")])
    app = Trouble(gateway.app, [refuse(401)])
    async with served(app) as url:
        with pytest.raises(BatchError, match="answers 401: not now"):
            await run(tmp_path, url)
    assert (tmp_path / "out.jsonl").read_bytes() == b""


async def test_bad_input_is_refused_before_anything_is_sent(
    tmp_path: Path, gateway: Gateway
) -> None:
    lines = [line("a", "hello"), line("b", "hello", url="/v1/embeddings"), line("a", "hello")]
    write(tmp_path / "in.jsonl", lines)
    async with served(gateway.app) as url, command(tmp_path, url) as process:
        _, stderr = await process.communicate()
        assert process.returncode == 1
    assert b"in.jsonl:2: url" in stderr
    assert b"in.jsonl:3: custom_id 'a' is that of line 1" in stderr
    assert not gateway.journals
    assert not (tmp_path / "out.jsonl").exists()
