"""Puts a gateway worker together from the configuration, and takes it apart again.

The only place that knows every part. What is made here is closed here, in reverse order.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI

from deployments.environment import TOKEN_ENV
from deployments.host_directory import HostDirectory
from deployments.lease import StoreLease
from deployments.placement_planner import PlacementPlanner
from deployments.registry import HostRegistry
from deployments.store import StateStore
from experts.catalogue import Catalogue
from experts.errors import ConfigError
from experts.http_backend import PoolLimits
from experts.protocol import Backend
from experts.tracing import Tracing, open_tracing
from experts.types import SourceKind
from gateway.access import AccessControl
from gateway.app import HttpLimits, Readiness, create_app
from gateway.backends import BackendPool
from gateway.config import Config
from gateway.embeddings_backend import EmbedderBackend, embedder_spec
from gateway.key_lookup import RecentKeys
from gateway.metric_batches import FlushTask
from gateway.metrics import Metrics
from gateway.openai_http import KeepAlive
from gateway.placement_client import HostCommands
from gateway.placement_task import PlacementTask
from gateway.random_ids import RandomIds
from gateway.service import Clock, GatewayService, ServiceLimits, build_service
from gateway.state.affinity import SessionMemory
from gateway.state.breakers import BreakerBoard
from gateway.state.decisions import DecisionLog
from gateway.state.feedback import FeedbackStore
from gateway.state.keys import KeyLedger, KeyStore
from gateway.state.moves import MoveLog
from gateway.state.policies import PolicyFollower, PolicyStore
from gateway.steering import Steering
from gateway.telemetry import log_request
from gateway.worker_gauges import GaugeTask, Sizes, WorkerGauges, WorkerView
from policies.live import PolicyWatcher
from routers.embedder import ServableEmbedder
from routers.router import SemanticRouter

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What a running worker consists of."""

    config: Config
    service: GatewayService
    metrics: Metrics
    policies: PolicyWatcher
    store: StateStore
    directory: HostDirectory
    gate: AccessControl
    breakers: BreakerBoard
    feedback: FeedbackStore
    decisions: DecisionLog
    policy_store: PolicyStore
    follower: PolicyFollower
    moves: MoveLog
    tracing: Tracing | None


def clock() -> Clock:
    """The process's clocks: monotonic for durations, wall for records."""
    return Clock(now_ms=lambda: time.monotonic() * 1000, wall_ms=lambda: int(time.time() * 1000))


@asynccontextmanager
async def open_parts(config: Config, redis_url: str) -> AsyncIterator[Parts]:
    """Everything a worker needs, running. Raises ConfigError or ArtifactError before that."""
    async with AsyncExitStack() as stack:
        store = StateStore(redis_url, timeout_ms=config.state.timeout_ms)
        stack.push_async_callback(store.aclose)
        directory = HostDirectory(HostRegistry(store))
        stack.push_async_callback(directory.aclose)
        await directory.start()
        policies = PolicyWatcher(config.policies.dir, config.catalogue.ids, config.policies.default)
        stack.push_async_callback(policies.aclose)
        await policies.start()
        policy_store = PolicyStore(store)
        follower = PolicyFollower(policy_store, policies.set_overrides)
        stack.push_async_callback(follower.aclose)
        await follower.start()
        router = SemanticRouter.load(
            config.router.artifact, cache_entries=config.router.cache_entries
        )
        stack.push_async_callback(router.aclose)
        decisions = DecisionLog(store)
        stack.push_async_callback(decisions.aclose)
        decisions.start()
        sessions = SessionMemory(store)
        stack.push_async_callback(sessions.aclose)
        sessions.start()
        feedback = FeedbackStore(store)
        stack.push_async_callback(feedback.aclose)
        feedback.start()
        gate = AccessControl(
            RecentKeys(KeyStore(store), clock().now_ms),
            KeyLedger(store),
            require_keys=config.gateway.require_keys,
            request_timeout_ms=config.gateway.limits.request_timeout_ms,
        )
        stack.push_async_callback(gate.aclose)
        metrics = Metrics()
        flushing = FlushTask(metrics.flush)
        stack.push_async_callback(flushing.aclose)
        flushing.start()
        tracing = open_tracing("coe-gateway", os.environ)
        begin_trace, observers = None, [metrics.observe, log_request]
        if tracing is not None:
            from gateway.tracing import RequestSpans

            stack.push_async_callback(tracing.aclose)
            spans = RequestSpans(tracing.tracer, log_prompts=config.telemetry.log_prompts)
            begin_trace, observers = spans.begin, [*observers, spans.finish]
        breakers = BreakerBoard(store, rules=config.gateway.breakers.rules())
        stack.push_async_callback(breakers.aclose)
        breakers.start()
        catalogue, builtin = _with_embedder(config, router)
        experts = BackendPool(
            directory=directory,
            host_token=lambda: os.environ.get(TOKEN_ENV),
            secret=os.environ.get,
            wall_ms=clock().wall_ms,
            overrides=builtin,
            breakers=breakers,
            limits=PoolLimits(connect_timeout_ms=config.gateway.limits.connect_timeout_ms),
        )
        directory.on_listed = experts.move_waiting
        stack.push_async_callback(experts.aclose)
        service = build_service(
            catalogue=catalogue,
            policies=lambda: policies.current,
            router=router,
            experts=experts,
            limits=_limits(config),
            clock=clock(),
            new_id=RandomIds("dec-"),
            gate=gate,
            records=decisions,
            observers=[*observers, sessions.observe],
            begin_trace=begin_trace,
            state_available=lambda: store.available and not directory.stale,
            breakers=breakers,
            retries=config.gateway.retries.rules(),
            steering=Steering(sessions, feedback.posteriors),
        )
        parts = Parts(
            config=config,
            service=service,
            metrics=metrics,
            policies=policies,
            store=store,
            directory=directory,
            gate=gate,
            breakers=breakers,
            feedback=feedback,
            decisions=decisions,
            policy_store=policy_store,
            follower=follower,
            moves=MoveLog(store),
            tracing=tracing,
        )
        await _start_placement(parts, stack)
        gauges = GaugeTask(WorkerGauges(metrics, config.catalogue.ids), lambda: _worker_view(parts))
        stack.push_async_callback(gauges.aclose)
        gauges.start()
        yield parts


async def _start_placement(parts: Parts, stack: AsyncExitStack) -> None:
    """Every worker watches, the one that has the lease acts; nobody does unless told to."""
    if parts.config.placement.mode == "off":
        return
    commands = HostCommands(token=lambda: os.environ.get(TOKEN_ENV))
    stack.push_async_callback(commands.aclose)
    task = PlacementTask(
        PlacementPlanner(parts.config.placement.planner()),
        StoreLease(parts.store, "placement", owner=secrets.token_hex(16)),
        hosts=parts.directory,
        commands=commands,
        moves=parts.moves,
        count=parts.metrics.count_move,
        now_ms=clock().now_ms,
        wall_ms=clock().wall_ms,
    )
    stack.push_async_callback(task.aclose)
    task.start()


def _worker_view(parts: Parts) -> WorkerView:
    return WorkerView(
        store_up=parts.store.available,
        hosts_stale=parts.directory.stale,
        hosts=parts.directory.records,
        policies=parts.policies.current,
        tripped={target: view.state.value for target, view in parts.breakers.tripped().items()},
        sizes=Sizes(
            decisions_queued=parts.decisions.queued,
            decisions_dropped=parts.decisions.dropped,
            settlements_waiting=parts.gate.waiting_settlements,
            settlements_lost=parts.gate.lost_settlements,
        ),
    )


def _with_embedder(config: Config, router: SemanticRouter) -> tuple[Catalogue, dict[str, Backend]]:
    """The catalogue with the router's embedder in it, if the configuration serves it."""
    price = config.router.embeddings_price
    if price is None:
        return config.catalogue, {}
    if not isinstance(router.embedder, ServableEmbedder):
        reason = f"the embedder {router.embedder.id!r} cannot be served"
        raise ConfigError(str(config.path), None, "router.embeddings", reason)
    embedder = router.embedder.widened()
    spec = embedder_spec(embedder, price)
    return config.catalogue.extended(spec), {spec.id: EmbedderBackend(embedder)}


def _limits(config: Config) -> ServiceLimits:
    limits = config.gateway.limits
    return ServiceLimits(
        prompt_chars=limits.prompt_chars,
        request_timeout_ms=limits.request_timeout_ms,
        first_token_timeout_ms=limits.first_token_timeout_ms,
        idle_timeout_ms=limits.idle_timeout_ms,
    )


def application(parts: Parts) -> FastAPI:
    """The HTTP application over running parts; closing them stays with ``open_parts``."""
    limits = parts.config.gateway.limits
    app = create_app(
        parts.service,
        metrics=parts.metrics,
        limits=HttpLimits(
            body_bytes=limits.body_bytes,
            concurrent_requests=limits.concurrent_requests,
            keep_alive=KeepAlive(limits.keep_alive_grace_ms, limits.keep_alive_interval_ms),
        ),
        readiness=_readiness(parts),
        feedback=parts.feedback,
    )
    if parts.tracing is not None:
        from gateway.tracing import TraceContext

        app.add_middleware(TraceContext)
    return app


def admin_application(parts: Parts, key: str | None) -> FastAPI:
    """The admin port's application over the same parts."""
    from gateway.admin.app import create_admin_app
    from gateway.admin.parts import AdminParts

    return create_admin_app(
        AdminParts(
            catalogue=parts.config.catalogue,
            keys=KeyStore(parts.store),
            ledger=KeyLedger(parts.store),
            decisions=parts.decisions,
            policies=parts.policies,
            policy_store=parts.policy_store,
            follower=parts.follower,
            hosts=parts.directory,
            moves=parts.moves,
            breakers=parts.breakers,
            metrics=parts.metrics,
            readiness=_readiness(parts),
            wall_ms=clock().wall_ms,
            random_bytes=secrets.token_bytes,
        ),
        key=key,
    )


def _readiness(parts: Parts) -> Callable[[], Awaitable[Readiness]]:
    async def look() -> Readiness:
        return Readiness(missing=_missing(parts), degraded=_degraded(parts))

    return look


def _missing(parts: Parts) -> dict[str, str]:
    """Without any expert that could answer, nothing can be served."""
    local = [s for s in parts.config.catalogue.specs if s.kind is SourceKind.WEIGHTS]
    if not local or len(local) < len(parts.config.catalogue):
        return {}
    if any(parts.directory.hosts_for(spec.id) for spec in local):
        return {}
    return {"hosts": "no expert host is registered; see `coe status`"}


def _degraded(parts: Parts) -> dict[str, str]:
    degraded: dict[str, str] = {}
    if not parts.store.available or parts.directory.stale:
        degraded["state"] = "the state store does not answer; routing on the last known hosts"
    if waiting := parts.gate.waiting_settlements:
        degraded["settlements"] = f"{waiting} wait for the state store; budgets lag behind"
    for file, error in parts.policies.errors.items():
        degraded[f"policy {file}"] = f"{error.message} (the previous version stays in force)"
    for spec in parts.config.catalogue.specs:
        if spec.kind is SourceKind.WEIGHTS and not parts.directory.hosts_for(spec.id):
            degraded[f"expert {spec.id}"] = _why_unserved(parts, spec.id)
    for target, view in parts.breakers.tripped().items():
        next_try = f"next try in {view.wait_ms} ms" if view.wait_ms else "next call is a probe"
        degraded[f"breaker {target}"] = f"{view.state.value} after failures; {next_try}"
    return degraded


def _why_unserved(parts: Parts, expert: str) -> str:
    for record in parts.directory.records:
        if expert in record.out_of_service:
            return f"out of service on {record.host_id}: {record.out_of_service[expert]}"
    return "no live host serves it"
