"""Builds gateways for tests: scripted experts, real policies, real catalogue, real servers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import uvicorn
from openai import AsyncOpenAI

from experts.catalogue import Catalogue
from experts.protocol import Backend
from experts.scripted import Script, ScriptedBackend
from experts.types import Capability, ExpertSpec, Price, SourceKind
from gateway.access import Gate
from gateway.app import HttpLimits, Readiness, create_app
from gateway.backends import BackendPool
from gateway.journal import Journal
from gateway.metrics import Metrics
from gateway.retries import RetryRules
from gateway.service import Clock, GatewayService, RecordSink, ServiceLimits, build_service
from gateway.state.affinity import SessionMemory
from gateway.state.breakers import BreakerBoard
from gateway.state.feedback import FeedbackStore
from gateway.steering import Steering
from policies.live import PolicyWatcher
from routers.types import Classification, QueryRouter

ALL_CAPABILITIES = frozenset(Capability) - {Capability.IMAGES, Capability.AUDIO}
PLAIN_POLICY = """
version: 1
default: echo
caps: {stages: 1, cost_usd: 1.0, deadline_ms: 60000}
max_output_tokens_default: 64
"""
CASCADE_POLICY = """
version: 1
default: [draft, final]
cascade:
  min_confidence: 0.6
  calibration:
    draft: {slope: 4.0, intercept: 1.0}
  stream_window: {tokens: 4, hold_ms: 2000}
caps: {stages: 2, cost_usd: 1.0, deadline_ms: 60000}
max_output_tokens_default: 64
"""


def spec(expert: str, location: str = "echo", **changes: Any) -> ExpertSpec:
    fields: dict[str, Any] = {
        "id": expert,
        "kind": SourceKind.SCRIPTED,
        "location": location,
        "price": Price(1_000_000, 2_000_000),
        "context_tokens": 8_192,
        "capabilities": ALL_CAPABILITIES,
    }
    return ExpertSpec(**fields | changes)


@dataclass
class FixedRouter:
    """A router that looks words up; only tests may use one."""

    by_word: Mapping[str, str] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    artifact_digest = "test"

    @property
    def categories(self) -> tuple[str, ...]:
        return (*self.by_word.values(), "general")

    async def classify(self, text: str) -> Classification:
        self.seen.append(text)
        found = next((c for w, c in self.by_word.items() if w in text), "general")
        posterior = {found: 0.9, "other": 0.1}
        return Classification(found, found, posterior, entropy=0.3, similarity=0.8, gate=None)

    async def aclose(self) -> None:
        return None


@dataclass
class Gateway:
    app: Any
    service: GatewayService
    pool: BackendPool
    metrics: Metrics
    records: list[dict[str, Any]]
    journals: list[Journal]
    backends: Mapping[str, Backend]

    def scripted(self, expert: str) -> ScriptedBackend:
        backend = self.backends[expert]
        assert isinstance(backend, ScriptedBackend)
        return backend


class Records(list[dict[str, Any]]):
    def append(self, record: dict[str, Any], /) -> None:
        super().append(record)


@dataclass
class _Both:
    first: RecordSink
    second: RecordSink

    def append(self, record: dict[str, Any], /) -> None:
        self.first.append(record)
        self.second.append(record)


def make_gateway(
    folder: Path,
    specs: list[ExpertSpec],
    *,
    policies: Mapping[str, str] | None = None,
    router: QueryRouter | None = None,
    directory: Any = None,
    limits: ServiceLimits | None = None,
    http_limits: HttpLimits | None = None,
    now_ms: Callable[[], float] | None = None,
    state_available: Callable[[], bool] = lambda: True,
    gate: Gate | None = None,
    new_id: Callable[[], str] | None = None,
    backends: Mapping[str, Backend] | None = None,
    breakers: BreakerBoard | None = None,
    retries: RetryRules | None = None,
    sessions: SessionMemory | None = None,
    feedback: FeedbackStore | None = None,
    decisions: RecordSink | None = None,
) -> Gateway:
    for name, text in (policies or {"auto": PLAIN_POLICY}).items():
        (folder / f"{name}.yaml").write_text(text)
    catalogue = Catalogue({s.id: s for s in specs})
    watcher = PolicyWatcher(folder, catalogue.ids, "auto")
    scripted = {
        s.id: ScriptedBackend(Script.parse(s.location, s.options))
        for s in specs
        if s.kind is SourceKind.SCRIPTED
    }
    pool = BackendPool(
        directory=directory,
        host_token=lambda: "host-token",
        secret={"UPSTREAM_KEY": "sk-upstream"}.get,
        wall_ms=lambda: int(time.time() * 1000),
        overrides={**scripted, **(backends or {})},
        breakers=(board := BreakerBoard() if breakers is None else breakers),
    )
    sessions = SessionMemory() if sessions is None else sessions
    records, journals, metrics = Records(), list[Journal](), Metrics()
    ids = (f"decision-{n}" for n in itertools.count())
    service = build_service(
        catalogue=catalogue,
        policies=lambda: watcher.current,
        router=router,
        experts=pool,
        limits=limits or ServiceLimits(),
        clock=Clock(now_ms or (lambda: time.monotonic() * 1000), lambda: 1_000),
        new_id=new_id or (lambda: next(ids)),
        gate=gate,
        records=_Both(records, decisions) if decisions else records,
        observers=(metrics.observe, journals.append, sessions.observe),
        state_available=state_available,
        breakers=board,
        retries=retries,
        steering=(
            Steering(sessions, feedback.posteriors, random.Random(1))
            if feedback
            else Steering(sessions)
        ),
    )

    async def readiness() -> Readiness:
        return Readiness()

    app = create_app(
        service, metrics=metrics, limits=http_limits, readiness=readiness, feedback=feedback
    )
    return Gateway(app, service, pool, metrics, records, journals, scripted)


class EmbeddedServer(uvicorn.Server):
    """uvicorn inside the test's event loop."""

    def __init__(self, app: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                loop="none",
                lifespan="on",
                log_config=None,
                timeout_graceful_shutdown=2,
            )
        )
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def at_rest(self) -> bool:
        """Nobody is connected, and what was asked before is done with."""
        return not self.server_state.connections and not self.server_state.tasks


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    """The base URL of the app on a free port."""
    async with server_of(app) as (url, _):
        yield url


@asynccontextmanager
async def server_of(app: Any) -> AsyncIterator[tuple[str, EmbeddedServer]]:
    """As ``served``, with the server itself."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = EmbeddedServer(app)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    await server.ready.wait()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", server
    finally:
        server.should_exit = True
        await task
        listener.close()


@asynccontextmanager
async def openai_client(
    base_url: str, app: Any | None = None, **options: Any
) -> AsyncIterator[AsyncOpenAI]:
    """The official client, strict; with ``app`` it calls in process."""
    transport = httpx2.ASGITransport(app=app) if app is not None else None
    defaults = {"max_retries": 0, "api_key": "test", "_strict_response_validation": True}
    settings: dict[str, Any] = defaults | options
    async with (
        httpx2.AsyncClient(transport=transport) as http,
        AsyncOpenAI(
            base_url=f"{base_url}/v1",
            http_client=http,
            **settings,
        ) as client,
    ):
        yield client


async def eventually(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    """Wait for something that another task or process is about to do.

    The bound only ends a test that fails. What is asserted afterwards must be true by the same
    moment, or be waited for as well.
    """
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - the other side knows no event of ours
            await asyncio.sleep(0.005)
