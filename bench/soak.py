"""Hours in minutes: mixed load with faults injected, and three sets of books that have to agree.

Two gateway workers, the state store, an upstream that fails on purpose (``_soak_upstream``) and
callers of every kind (``_soak_client``). Meanwhile workers are killed and replaced, and the store
freezes, or is killed and started again. In the end no request may be lost, doubled or mischarged
(``_soak_ledger``). Exit status 1 if one is.

    python bench/soak.py [--json FILE] [--minutes 2] [--rate 60] [--seed 1]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import aiohttp  # noqa: E402 - the project root has to be importable first
import msgspec  # noqa: E402
import psutil  # noqa: E402

from bench import _report, _soak_client, _soak_ledger  # noqa: E402
from deployments.embedded_valkey import EmbeddedValkey  # noqa: E402
from deployments.environment import CONFIG_ENV, REDIS_ENV  # noqa: E402
from deployments.store import StateStore  # noqa: E402
from experts.errors import StateUnavailable  # noqa: E402
from gateway.keys import KeyBudgets, KeyLimits, KeyScope, digest_of, key_secret  # noqa: E402
from gateway.process_tree import dies_with_us  # noqa: E402
from gateway.state.keys import KeyLedger, KeyStore  # noqa: E402

WORKERS = 2
CALLERS = 16
RICH_KEYS = 6
READY_S = 120.0
LEASE_S = 45.0  # deadline of the policies below, and the margin that a lease adds
KILL_EVERY_S, STORE_EVERY_S, FROZEN_S = 17.0, 29.0, 1.5
DECISION_KEY = "coe:decisions"

EXPERT = """
  {name}:
    source: {{url: "{url}/v1", model: {name}}}
    price: {{input_usd_per_mtok: {input}, output_usd_per_mtok: {output}}}
    context_tokens: 8192
    capabilities: [chat, completions, logprobs]
"""
CONFIG = """
experts:{experts}
policies: {{dir: policies, default: auto}}
gateway:
  require_keys: true
  limits: {{connect_timeout_ms: 1000, first_token_timeout_ms: 1500, idle_timeout_ms: 1500}}
"""
POLICIES = {
    "auto": """
version: 1
default: flaky
fallbacks: [backup]
caps: {stages: 2, cost_usd: 0.001, deadline_ms: 8000}
""",
    "casc": """
version: 1
default: [draft, final]
fallbacks: [backup]
cascade:
  min_confidence: 0.6
  calibration: {draft: {slope: 4.0, intercept: 1.0}}
  stream_window: {tokens: 3, hold_ms: 1000}
caps: {stages: 3, cost_usd: 0.002, deadline_ms: 8000}
""",
}


def main() -> int:
    options = _options()
    if options.serve:
        _serve_upstream(options.fd)
        return 0
    try:
        result = asyncio.run(_soak(options))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM
    summary = {name: value for name, value in result.items() if name != "examples"}
    print(json.dumps(summary, indent=2), file=sys.stderr)
    _report.write(result, options.json)
    return 0 if result["passed"] else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", help="result file; - for standard output")
    parser.add_argument("--minutes", type=float, default=2.0, help="length of the load")
    parser.add_argument("--rate", type=float, default=60.0, help="requests per second to aim at")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", choices=["upstream"], help=argparse.SUPPRESS)
    parser.add_argument("--fd", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


async def _soak(options: argparse.Namespace) -> dict[str, Any]:
    running = asyncio.current_task()
    assert running is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        valkey = stack.enter_context(EmbeddedValkey(data_dir=folder / "store"))
        valkey.wait_ready()
        upstream = stack.enter_context(_upstream())
        workers = stack.enter_context(Workers(_written(folder, upstream), valkey.url))
        run = _Run(options, valkey, workers, upstream)
        try:
            return await run.whole()
        finally:
            await run.store.aclose()


class _Run:
    """One soak: load, trouble and book-keeping at once, then the verdict."""

    def __init__(
        self, options: argparse.Namespace, valkey: EmbeddedValkey, workers: Workers, upstream: str
    ) -> None:
        self._options = options
        self._valkey = valkey
        self._workers = workers
        self._upstream = upstream
        self._dice = random.Random(options.seed)
        self._books = _soak_ledger.Books()
        self._last_entry = "-"
        self._store_troubles = 0
        self._calm = asyncio.Lock()  # one kind of trouble at a time
        self.store = StateStore(valkey.url, timeout_ms=5_000)

    async def whole(self) -> dict[str, Any]:
        keys = await self._make_keys()
        # A connection each: an idle one may be closed by the server just when it is used again.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as http:
            await ready(http, self._workers.url)
            resident_before = self._workers.resident_mib()
            until_s = time.monotonic() + self._options.minutes * 60
            beside = [
                asyncio.create_task(coroutine)
                for coroutine in (self._kill(until_s), self._trouble_store(until_s), self._keep())
            ]
            await self._load(http, keys, until_s)
            await asyncio.gather(*beside[:2])
            # Whatever a killed worker had reserved comes free when its lease ends.
            await asyncio.sleep(LEASE_S if self._books.kills_s else 2.0)
            beside[2].cancel()
            await asyncio.gather(beside[2], return_exceptions=True)
            await self._collect(http)
        await self._read_charges(keys)
        seen = self._books.seen
        return {
            **_soak_ledger.verdict(self._books),
            "minutes": self._options.minutes,
            "requests": len(seen),
            "requests_per_s": round(len(seen) / (self._options.minutes * 60), 1),
            "workers_killed": len(self._books.kills_s),
            "store_troubles": self._store_troubles,
            "longest_request_s": round(max(one.ended_s - one.began_s for one in seen), 2),
            "resident_mib_before": resident_before,
            "resident_mib_after": self._workers.resident_mib(),
            "seed": self._options.seed,
        }

    async def _load(self, http: aiohttp.ClientSession, keys: _soak_client.Keys, s: float) -> None:
        pause_s = CALLERS / self._options.rate
        await asyncio.gather(
            *(
                _soak_client.client(
                    http,
                    self._workers.url,
                    keys,
                    random.Random(f"{self._options.seed} {number}"),
                    s,
                    pause_s,
                    self._books.seen,
                )
                for number in range(CALLERS)
            )
        )

    # --- trouble -----------------------------------------------------------------------------

    async def _kill(self, until_s: float) -> None:
        """Never while the store is away: two faults at once may lose a charge, and may do so."""
        while time.monotonic() + KILL_EVERY_S < until_s:
            await asyncio.sleep(KILL_EVERY_S)
            while not self._workers.all_serve() and time.monotonic() < until_s:  # noqa: ASYNC110
                # Otherwise both might be gone at once, and nobody would answer.
                await asyncio.sleep(0.2)
            async with self._calm:
                self._books.kills_s.append(time.monotonic())
                self._workers.replace(self._dice.randrange(WORKERS))
                await asyncio.sleep(2.0)

    async def _trouble_store(self, until_s: float) -> None:
        while time.monotonic() + STORE_EVERY_S < until_s:
            await asyncio.sleep(STORE_EVERY_S)
            async with self._calm:
                self._store_troubles += 1
                if self._store_troubles % 2:
                    os.kill(self._valkey.pid or 0, signal.SIGSTOP)
                    await asyncio.sleep(FROZEN_S)
                    os.kill(self._valkey.pid or 0, signal.SIGCONT)
                else:
                    os.kill(self._valkey.pid or 0, signal.SIGKILL)
                    await asyncio.sleep(FROZEN_S)
                    await asyncio.to_thread(self._valkey.wait_ready)
                await asyncio.sleep(8.0)  # the gateways' back-off, then what waited is settled

    # --- books -------------------------------------------------------------------------------

    async def _make_keys(self) -> _soak_client.Keys:
        made = [key_secret(secrets.token_bytes(32)) for _ in range(RICH_KEYS + 2)]
        store = KeyStore(self.store)
        for number, secret in enumerate(made[:-1]):
            budget = 1_000_000_000 if number < RICH_KEYS else 20_000
            budgets = KeyBudgets(total=budget)
            await store.create(digest_of(secret), "soak", KeyScope(), KeyLimits(), budgets)
        return _soak_client.Keys(tuple(made[:RICH_KEYS]), made[-2], made[-1])

    async def _keep(self) -> None:
        """Read the bounded decision log on, before it forgets."""
        while True:
            await asyncio.sleep(1.0)
            with contextlib.suppress(StateUnavailable):
                await self._read_records()

    async def _read_records(self) -> None:
        while True:
            start = "-" if self._last_entry == "-" else f"({self._last_entry}"
            entries = await self.store.command("XRANGE", DECISION_KEY, start, "+", "COUNT", 1_000)
            for entry, fields in entries:
                self._last_entry = entry.decode()
                self._note(msgspec.json.decode(fields[b"record"]))
            if not entries:
                return

    def _note(self, record: dict[str, Any]) -> None:
        """A record may stand in the log twice; a request has one decision."""
        known = self._books.records.setdefault(record["request_id"], [])
        if all(other["decision_id"] != record["decision_id"] for other in known):
            known.append(record)

    async def _collect(self, http: aiohttp.ClientSession) -> None:
        await self._read_records()
        while True:
            after = len(self._books.upstream)
            async with http.get(f"{self._upstream}/ledger", params={"after": after}) as answer:
                more = await answer.json()
            if not more:
                return
            self._books.upstream += more

    async def _read_charges(self, keys: _soak_client.Keys) -> None:
        ledger = KeyLedger(self.store)
        for secret in (*keys.rich, keys.poor):
            usage = await ledger.usage(digest_of(secret))
            self._books.charged_micro_usd[secret] = usage.total
            self._books.reserved_micro_usd[secret] = usage.reserved
        if self._books.charged_micro_usd[keys.poor] > 20_000:
            raise AssertionError("a budget was overspent")


# --- processes -----------------------------------------------------------------------------------


class Workers:
    """Gateway workers on one socket, as ``coe serve`` runs them, killed and replaced at will.

    Started by the main thread alone: what dies with us dies with the thread that started it.
    """

    def __init__(self, config: Path, redis_url: str, count: int = WORKERS) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._environment = {
            **os.environ,
            CONFIG_ENV: str(config),
            REDIS_ENV: redis_url,
            "COE_LOG_LEVEL": "ERROR",
            "PYTHONPATH": str(ROOT),
        }
        self._port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._running = [self._start() for _ in range(count)]

    def replace(self, number: int) -> None:
        self._running[number].kill()
        self._running[number].wait()
        self._running[number] = self._start()

    def all_serve(self) -> bool:
        """Whether each of them holds a connection of a caller now."""
        return all(
            any(
                connection.status == psutil.CONN_ESTABLISHED and connection.laddr.port == self._port
                for connection in psutil.Process(worker.pid).net_connections("tcp")
            )
            for worker in self._running
        )

    def resident_mib(self) -> list[float]:
        return [
            round(psutil.Process(worker.pid).memory_info().rss / 2**20, 1)
            for worker in self._running
        ]

    def _start(self) -> subprocess.Popen[bytes]:
        descriptor = self._listener.fileno()
        return subprocess.Popen(
            [sys.executable, "-m", "gateway.worker", str(descriptor)],
            pass_fds=[descriptor],
            env=self._environment,
            cwd=ROOT,
            start_new_session=True,  # Ctrl-C is for us
            preexec_fn=dies_with_us(),
        )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._running:
            worker.terminate()
        for worker in self._running:
            try:
                worker.wait(timeout=20)
            except subprocess.TimeoutExpired:
                worker.kill()
                worker.wait()
        self._listener.close()


def _written(folder: Path, upstream: str) -> Path:
    """The configuration, as a file."""
    prices = {"input": _soak_ledger.INPUT_MICRO_USD, "output": _soak_ledger.OUTPUT_MICRO_USD}
    names = ("flaky", "draft", "final", "backup")
    experts = "".join(EXPERT.format(name=name, url=upstream, **prices) for name in names)
    (folder / "policies").mkdir()
    for name, text in POLICIES.items():
        (folder / "policies" / f"{name}.yaml").write_text(text)
    config = folder / "coe.yaml"
    config.write_text(CONFIG.format(experts=experts))
    return config


@contextlib.contextmanager
def _upstream() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        descriptor = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, __file__, "--serve", "upstream", "--fd", str(descriptor)],
            pass_fds=[descriptor],
            cwd=ROOT,
            start_new_session=True,
            preexec_fn=dies_with_us(),
        )
    try:
        yield url
    finally:
        process.terminate()
        process.wait(timeout=10)


def _serve_upstream(descriptor: int) -> None:
    import uvicorn

    from bench._soak_upstream import Upstream

    config = uvicorn.Config(
        Upstream(), loop="uvloop", http="httptools", log_level="critical", lifespan="off"
    )
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


async def ready(http: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(READY_S), http.get(url + "/health/ready") as answer:
        answer.raise_for_status()


if __name__ == "__main__":
    sys.exit(main())
