"""Puts a gateway worker together from the configuration, and takes it apart again.

The only place that knows every part. What is made here is closed here, in reverse order.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI

from deployments.environment import TOKEN_ENV
from deployments.host_directory import HostDirectory
from deployments.registry import HostRegistry
from deployments.store import StateStore
from experts.types import SourceKind
from gateway.access import AccessControl
from gateway.app import HttpLimits, Readiness, create_app
from gateway.backends import BackendPool
from gateway.config import Config
from gateway.metrics import Metrics
from gateway.service import Clock, GatewayService, ServiceLimits, build_service
from gateway.state.decisions import DecisionLog
from gateway.state.keys import KeyLedger, KeyStore
from gateway.telemetry import log_request
from policies.live import PolicyWatcher
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
        router = SemanticRouter.load(
            config.router.artifact, cache_entries=config.router.cache_entries
        )
        stack.push_async_callback(router.aclose)
        decisions = DecisionLog(store)
        stack.push_async_callback(decisions.aclose)
        decisions.start()
        gate = AccessControl(
            KeyStore(store),
            KeyLedger(store),
            require_keys=config.gateway.require_keys,
            request_timeout_ms=config.gateway.limits.request_timeout_ms,
        )
        stack.push_async_callback(gate.aclose)
        metrics = Metrics()
        experts = BackendPool(
            directory=directory,
            host_token=lambda: os.environ.get(TOKEN_ENV),
            secret=os.environ.get,
            wall_ms=clock().wall_ms,
        )
        stack.push_async_callback(experts.aclose)
        service = build_service(
            catalogue=config.catalogue,
            policies=lambda: policies.current,
            router=router,
            experts=experts,
            limits=_limits(config),
            clock=clock(),
            new_id=lambda: f"dec-{uuid.uuid4().hex}",
            gate=gate,
            records=decisions,
            observers=(metrics.observe, log_request),
            state_available=lambda: store.available and not directory.stale,
        )
        yield Parts(config, service, metrics, policies, store, directory, gate)


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
    return create_app(
        parts.service,
        metrics=parts.metrics,
        limits=HttpLimits(
            body_bytes=limits.body_bytes, concurrent_requests=limits.concurrent_requests
        ),
        readiness=_readiness(parts),
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
    return degraded


def _why_unserved(parts: Parts, expert: str) -> str:
    for record in parts.directory.records:
        if expert in record.out_of_service:
            return f"out of service on {record.host_id}: {record.out_of_service[expert]}"
    return "no live host serves it"
