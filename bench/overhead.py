"""What the gateway adds in front of an expert: the same upstream asked directly and through it.

Three processes: the shipped scripted server as upstream, one gateway worker (uvicorn, uvloop,
httptools), and this client. Direct and gateway calls alternate, so that load from elsewhere on the
machine falls on both. Bounded by design to well under 90 seconds.

    python bench/overhead.py [--json FILE] [--rounds 300] [--seconds 5]

With ``vllm-router`` installed (optional, see ``_vllm_router.py``) the load phases also run through
it, in turns with the gateway, and the ratios are reported.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import aiohttp  # noqa: E402 - the project root has to be importable first
import psutil  # noqa: E402

from bench import _report, _vllm_router  # noqa: E402
from deployments.environment import REDIS_ENV  # noqa: E402
from gateway.process_tree import dies_with_us  # noqa: E402

ARTIFACT = ROOT / "routers" / "data" / "quickstart" / "artifact"
CHUNKS = 50
SCRIPTS = {"plain": "fixed?text=a short answer of six words", "chunks": f"tokens?count={CHUNKS}"}
MODELS = {"plain": "auto", "chunks": "coe/chunks"}  # asked by policy; upstream knows both names
PROMPT = "How many legs do three spiders have together?"
POLICY = """
version: 1
default: {expert}
caps: {{stages: 1, cost_usd: 1.0, deadline_ms: 60000}}
max_output_tokens_default: 256
"""
READY_S = 60.0
_PAIRS = 6  # phases through the gateway and through the peer, in turns
PATH = "/v1/chat/completions"

Call = Callable[[str], Awaitable[float]]


class _Server(NamedTuple):
    url: str
    pid: int


async def main() -> int:
    options = _options()
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(_serving("upstream")).url
        plain = stack.enter_context(_serving("gateway", "--upstream", upstream))
        async with _client() as http:
            await asyncio.gather(_ready(http, upstream, "/v1/models"), _ready(http, plain.url))
            result = await _measure(http, upstream, plain, options)
    with contextlib.ExitStack() as stack:
        result |= await _with_peer(stack, options)
    with contextlib.ExitStack() as stack:
        result |= await _with_router(stack, options)
    with contextlib.ExitStack() as stack:
        result |= await _with_keys(stack, options)
    _print(result)
    _report.write(result, options.json)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", help="result file; - for standard output")
    parser.add_argument("--rounds", type=int, default=300, help="sequential calls on each path")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each load phase")
    parser.add_argument("--vllm-router", metavar="FILE", help="the peer's executable")
    parser.add_argument("--serve", choices=["upstream", "gateway"], help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--upstream", help=argparse.SUPPRESS)
    parser.add_argument("--router", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--keys", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- measuring -----------------------------------------------------------------------------------


async def _measure(
    http: aiohttp.ClientSession, direct: str, server: _Server, options: argparse.Namespace
) -> dict[str, Any]:
    gateway, pid = server
    ask, stream = _asker(http), _streamer(http)
    await _alternating(ask, (direct, gateway), 50)  # warm-up: connections, code paths
    asked = await _alternating(ask, (direct, gateway), options.rounds)
    first = await _alternating(stream, (direct, gateway), options.rounds // 2)
    direct_rps, _ = await _rate(ask, direct, 64, options.seconds)
    rps, cpu_ms = await _rate(ask, gateway, 64, options.seconds, pid)
    direct_streams, _ = await _rate(stream, direct, 32, options.seconds)
    streams, stream_cpu_ms = await _rate(stream, gateway, 32, options.seconds, pid)
    direct_ms, gateway_ms = asked
    return {
        "direct_p50_ms": _p(direct_ms, 50),
        "direct_p99_ms": _p(direct_ms, 99),
        "gateway_p50_ms": _p(gateway_ms, 50),
        "gateway_p99_ms": _p(gateway_ms, 99),
        "added_p50_ms": round(_p(gateway_ms, 50) - _p(direct_ms, 50), 3),
        "added_p99_ms": round(_p(gateway_ms, 99) - _p(direct_ms, 99), 3),
        "direct_ttft_p50_ms": _p(first[0], 50),
        "added_ttft_p50_ms": round(_p(first[1], 50) - _p(first[0], 50), 3),
        "direct_rps_c64": direct_rps,
        "rps_c64": rps,
        "rps_ratio": round(rps / direct_rps, 3),
        "gateway_cpu_ms_per_request": cpu_ms,
        "chunks_per_stream": CHUNKS,
        "direct_streams_per_s_c32": direct_streams,
        "streams_per_s_c32": streams,
        "streams_ratio": round(streams / direct_streams, 3),
        "gateway_cpu_ms_per_stream": stream_cpu_ms,
        "sequential_calls": options.rounds,
        "load_seconds": options.seconds,
    }


async def _with_peer(stack: contextlib.ExitStack, options: argparse.Namespace) -> dict[str, Any]:
    """Both load phases through the gateway and through the peer, in turns, on one upstream."""
    executable = _vllm_router.command(options.vllm_router)
    if executable is None:
        reason = "vllm-router is not installed (pip install vllm-router==0.1.17)"
        return {"rps_vs_vllm_router": None, "streams_vs_vllm_router": None, "peer": reason}
    upstream = stack.enter_context(_serving("upstream")).url
    gateway = stack.enter_context(_serving("gateway", "--upstream", upstream)).url
    peer = stack.enter_context(_vllm_router.running(executable, upstream)).url
    async with _client() as http:
        await asyncio.gather(_ready(http, upstream, "/v1/models"), _ready(http, gateway))
        await _listening(http, peer)
        ask, stream = _asker(http), _streamer(http)
        await _alternating(ask, (gateway, peer), 50)
        gateway_ms, peer_ms = await _alternating(ask, (gateway, peer), options.rounds)
        rps = await _in_turns(ask, (gateway, peer), 64, options.seconds)
        streams = await _in_turns(stream, (gateway, peer), 32, options.seconds)
    return {
        "vllm_router_p50_ms": _p(peer_ms, 50),
        "p50_over_vllm_router": round(_p(gateway_ms, 50) / _p(peer_ms, 50), 3),
        "vllm_router_rps_c64": rps[1],
        "rps_beside_vllm_router": rps[0],
        "rps_vs_vllm_router": round(statistics.median(rps[2]), 3),
        "rps_vs_vllm_router_by_pair": rps[2],
        "vllm_router_streams_per_s_c32": streams[1],
        "streams_vs_vllm_router": round(statistics.median(streams[2]), 3),
        "streams_vs_vllm_router_by_pair": streams[2],
    }


async def _in_turns(
    call: Call, urls: tuple[str, str], concurrency: int, seconds: float
) -> tuple[float, float, list[float]]:
    """Calls per second on either path, and the first's share of the second's in each pair of
    phases. Every other pair goes the other way round, so that a drift falls on both.
    """
    rates: tuple[list[float], list[float]] = ([], [])
    for pair in range(_PAIRS):
        for one in (0, 1) if pair % 2 == 0 else (1, 0):
            rate, _ = await _rate(call, urls[one], concurrency, 2 * seconds / _PAIRS)
            rates[one].append(rate)
    ratios = [round(a / b, 3) for a, b in zip(*rates, strict=True)]
    return statistics.median(rates[0]), statistics.median(rates[1]), ratios


async def _with_router(stack: contextlib.ExitStack, options: argparse.Namespace) -> dict[str, Any]:
    """The classifier's share: a gateway that routes against one that does not, new prompts each."""
    if not (ARTIFACT / "manifest.json").exists():
        return {"router_added_p50_ms": None, "router": "no router artifact in this checkout"}
    upstream = stack.enter_context(_serving("upstream")).url
    without = stack.enter_context(_serving("gateway", "--upstream", upstream)).url
    routed = stack.enter_context(_serving("gateway", "--upstream", upstream, "--router")).url
    rounds = max(20, options.rounds // 3)
    async with _client() as http:
        await asyncio.gather(*(_ready(http, url) for url in (without, routed)))
        numbers = iter(range(10**6))

        async def ask_new(url: str) -> float:
            prompt = f"{PROMPT} This is question {next(numbers)}."
            return await _asker(http, prompt)(url)

        await _alternating(ask_new, (without, routed), 10)
        plain_ms, routed_ms = await _alternating(ask_new, (without, routed), rounds)
        await _alternating(_asker(http), (without, routed), 10)
        cached = await _alternating(_asker(http), (without, routed), rounds)
    return {
        "router_added_p50_ms": round(_p(routed_ms, 50) - _p(plain_ms, 50), 3),
        "router_added_p99_ms": round(_p(routed_ms, 99) - _p(plain_ms, 99), 3),
        "router_cached_added_p50_ms": round(_p(cached[1], 50) - _p(cached[0], 50), 3),
        "router_calls": rounds,
    }


async def _with_keys(stack: contextlib.ExitStack, options: argparse.Namespace) -> dict[str, Any]:
    """What a key with every kind of limit adds: the same gateway with and without it, in turns.

    Admission and settlement are a round trip each to a Valkey server on this machine.
    """
    from deployments.embedded_valkey import EmbeddedValkey

    os.environ[REDIS_ENV] = stack.enter_context(EmbeddedValkey()).url
    secret = await _new_key()
    upstream = stack.enter_context(_serving("upstream")).url
    url, pid = stack.enter_context(_serving("gateway", "--upstream", upstream, "--keys"))
    async with _client() as http:
        await asyncio.gather(_ready(http, upstream, "/v1/models"), _ready(http, url))
        ask, ask_keyed = _asker(http), _asker(http, secret=secret)

        async def either(secret_sent: str) -> float:
            return await (ask_keyed if secret_sent else ask)(url)

        await _alternating(either, ("", secret), 50)
        plain_ms, keyed_ms = await _alternating(either, ("", secret), options.rounds)
        rps, cpu_ms = await _rate(ask, url, 64, options.seconds, pid)
        keyed_rps, keyed_cpu_ms = await _rate(ask_keyed, url, 64, options.seconds, pid)
    return {
        "key_added_p50_ms": round(_p(keyed_ms, 50) - _p(plain_ms, 50), 3),
        "key_added_p99_ms": round(_p(keyed_ms, 99) - _p(plain_ms, 99), 3),
        "keyless_rps_c64": rps,
        "keyed_rps_c64": keyed_rps,
        "keyless_cpu_ms_per_request": cpu_ms,
        "keyed_cpu_ms_per_request": keyed_cpu_ms,
    }


async def _new_key() -> str:
    from deployments.store import StateStore
    from gateway.keys import KeyBudgets, KeyLimits, KeyScope, digest_of, key_secret
    from gateway.state.keys import KeyStore

    store = StateStore(os.environ[REDIS_ENV], timeout_ms=5_000)
    secret, much = key_secret(secrets.token_bytes(32)), 10**12
    await KeyStore(store).create(
        digest_of(secret),
        "bench",
        KeyScope(),
        KeyLimits(10**8, 10**9, 10**6),
        KeyBudgets(much, much, much, much),
    )
    await store.aclose()
    return secret


def _asker(http: aiohttp.ClientSession, prompt: str = PROMPT, secret: str = "") -> Call:
    headers = {"authorization": f"Bearer {secret}"} if secret else {}

    async def ask(url: str) -> float:
        started = time.perf_counter()
        async with http.post(
            url + PATH, data=_body("plain", prompt, stream=False), headers=headers
        ) as answer:
            body = await answer.read()
        took_ms = (time.perf_counter() - started) * 1000.0
        if answer.status != 200 or b"a short answer" not in body:
            raise RuntimeError(f"{url} answered {answer.status}: {body[:200]!r}")
        return took_ms

    return ask


def _streamer(http: aiohttp.ClientSession) -> Call:
    async def stream(url: str) -> float:
        started = time.perf_counter()
        async with http.post(url + PATH, data=_body("chunks", PROMPT, stream=True)) as answer:
            data = await answer.content.readany()
            first_ms = (time.perf_counter() - started) * 1000.0
            data += await answer.read()
        if answer.status != 200 or data.count(b'"content"') != CHUNKS or b"[DONE]" not in data:
            raise RuntimeError(f"{url}: a broken stream: {data[-200:]!r}")
        return first_ms

    return stream


def _body(expert: str, prompt: str, *, stream: bool) -> bytes:
    body = {
        "model": MODELS[expert],
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": prompt},
        ],
        "max_tokens": 100,
        "stream": stream,
    }
    if expert == "plain" and not stream:
        body["temperature"] = 0
    return json.dumps(body).encode()


async def _alternating(
    call: Call, urls: tuple[str, str], rounds: int
) -> tuple[list[float], list[float]]:
    """Sequential calls, first one path then the other, ``rounds`` times."""
    first: list[float] = []
    second: list[float] = []
    for _ in range(rounds):
        first.append(await call(urls[0]))
        second.append(await call(urls[1]))
    return first, second


async def _rate(
    call: Call, url: str, concurrency: int, seconds: float, pid: int | None = None
) -> tuple[float, float | None]:
    """Completed calls per second with ``concurrency`` callers, each starting anew at once.

    Also the processor milliseconds that ``pid`` spent per call, which other load on the machine
    disturbs much less than the rate.
    """
    end = time.perf_counter() + seconds
    done = 0

    async def caller() -> None:
        nonlocal done
        while time.perf_counter() < end:
            await call(url)
            done += 1

    before_s, started = _cpu_s(pid), time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(concurrency)))
    rate = round(done / (time.perf_counter() - started), 1)
    return rate, None if pid is None else round((_cpu_s(pid) - before_s) * 1000.0 / done, 3)


def _cpu_s(pid: int | None) -> float:
    if pid is None:
        return 0.0
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _p(values: list[float], percent: int) -> float:
    return round(statistics.quantiles(values, n=100, method="inclusive")[percent - 1], 3)


def _print(result: dict[str, Any]) -> None:
    for key, value in result.items():
        print(f"{key:>28}  {value}", file=sys.stderr)


# --- processes -----------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def _client() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4),
        headers={"content-type": "application/json"},
    ) as http:
        yield http


@contextlib.contextmanager
def _serving(role: str, *arguments: str) -> Iterator[_Server]:
    """A server process on a free port."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        descriptor = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, __file__, "--serve", role, "--fd", str(descriptor), *arguments],
            pass_fds=[descriptor],
            cwd=ROOT,
            preexec_fn=dies_with_us(),
        )
    # Only the child holds the socket now: should it die, callers are refused instead of waiting.
    try:
        yield _Server(url, process.pid)
    finally:
        process.terminate()
        process.wait(timeout=10)


async def _ready(http: aiohttp.ClientSession, url: str, path: str = "/health/ready") -> None:
    """The socket listens from the start, so the first answer is all there is to wait for."""
    async with asyncio.timeout(READY_S), http.get(url + path) as answer:
        answer.raise_for_status()


async def _listening(http: aiohttp.ClientSession, url: str) -> None:
    """Until a process whose socket is its own answers its health check."""
    async with asyncio.timeout(READY_S):
        while True:
            with contextlib.suppress(aiohttp.ClientConnectionError):
                async with http.get(url + "/health") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.1)


def serve(options: argparse.Namespace) -> None:
    """A child's whole life."""
    import uvicorn

    from gateway.http_protocol import ConnectionLimits
    from gateway.serving import server_config, spare_what_was_loaded

    app = _upstream_app() if options.serve == "upstream" else _gateway_app(options)
    config = server_config(app, ConnectionLimits())  # as the gateway's workers serve
    spare_what_was_loaded()
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=options.fd)])


def _upstream_app() -> Any:
    from experts.scripted import Script
    from experts.scripted_server import ScriptedServer

    scripts = {name: Script.parse(text) for name, text in SCRIPTS.items()}
    names = scripts | {MODELS[name]: script for name, script in scripts.items()}
    return _Healthy(ScriptedServer(names))


class _Healthy:
    """Answers the health check that the peer wants of its workers."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/health":
            await self._app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


class _OneHost:
    """A directory that knows the upstream as the host of every expert."""

    def __init__(self, url: str) -> None:
        from deployments.host_record import HostRecord

        now_ms = int(time.time() * 1000) + 3_600_000  # stays fresh without heartbeats
        self._records = [HostRecord("host", url, tuple(SCRIPTS), "plain", heartbeat_ms=now_ms)]

    def hosts_for(self, expert: str) -> list[Any]:
        return self._records

    def mark_suspect(self, host_id: str, until_ms: float) -> None:
        raise RuntimeError("the upstream broke a connection")

    def note_dispatched(self, host_id: str, expert: str) -> None:
        return None


def _gateway_app(options: argparse.Namespace) -> Any:
    from experts.catalogue import Catalogue
    from experts.types import Capability, ExpertSpec, Price, SourceKind
    from gateway.app import Readiness, create_app
    from gateway.backends import BackendPool
    from gateway.metrics import Metrics
    from gateway.random_ids import RandomIds
    from gateway.service import Clock, ServiceLimits, build_service
    from gateway.telemetry import log_request
    from policies.live import PolicyWatcher

    specs = {
        name: ExpertSpec(
            id=name,
            kind=SourceKind.WEIGHTS,
            location="",
            price=Price(1_000_000, 2_000_000),
            context_tokens=8_192,
            capabilities=frozenset({Capability.CHAT}),
        )
        for name in SCRIPTS
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in SCRIPTS:
            Path(folder, f"{name}.yaml").write_text(POLICY.format(expert=name))
        policies = PolicyWatcher(Path(folder), tuple(SCRIPTS), "plain").current
    metrics = Metrics()
    pool = BackendPool(
        directory=_OneHost(options.upstream),
        host_token=lambda: "token",
        secret=lambda _: None,
        wall_ms=lambda: int(time.time() * 1000),
    )
    service = build_service(
        catalogue=Catalogue(specs),
        policies=lambda: policies,
        router=_router() if options.router else None,
        experts=pool,
        limits=ServiceLimits(),
        clock=Clock(lambda: time.monotonic() * 1000, lambda: int(time.time() * 1000)),
        new_id=RandomIds("dec-"),
        gate=_gate() if options.keys else None,
        observers=(metrics.observe, log_request),
    )

    async def readiness() -> Readiness:
        return Readiness()

    return create_app(service, metrics=metrics, readiness=readiness)


def _gate() -> Any:
    from deployments.store import StateStore
    from gateway.access import AccessControl
    from gateway.state.keys import KeyLedger, KeyStore

    store = StateStore(os.environ[REDIS_ENV], timeout_ms=5_000)
    return AccessControl(
        KeyStore(store), KeyLedger(store), require_keys=False, request_timeout_ms=120_000
    )


def _router() -> Any:
    from routers.router import SemanticRouter

    return SemanticRouter.load(ARTIFACT)


if __name__ == "__main__":
    arguments = _options()
    if arguments.serve:
        serve(arguments)
    else:
        sys.exit(asyncio.run(main()))
