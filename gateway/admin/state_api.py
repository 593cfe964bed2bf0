"""What is going on: status, experts, residency, breakers, decisions, money. Read only."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import JSONResponse

from deployments.host_record import HostRecord, PoolRecord
from experts.errors import InvalidRequest, StateUnavailable
from experts.types import MICRO_USD_PER_USD, ExpertSpec, SourceKind
from gateway.admin.parts import AdminParts
from gateway.breakers import expert_target
from gateway.state.decisions import TAIL_MAX
from gateway.state.moves import MoveLog

__all__ = ["state_router"]


def state_router(parts: AdminParts) -> APIRouter:
    """The routes that only look."""
    router = APIRouter()

    @router.get("/status")
    async def status() -> JSONResponse:
        ready = await parts.readiness()
        word = "unready" if ready.missing else "degraded" if ready.degraded else "ready"
        lacks = {"missing": dict(ready.missing), "degraded": dict(ready.degraded)}
        return JSONResponse({"status": word, **lacks, "money": parts.metrics.money()})

    @router.get("/experts")
    async def experts() -> JSONResponse:
        return JSONResponse({"experts": [_expert(s, parts) for s in parts.catalogue.specs]})

    @router.get("/residency")
    async def residency() -> JSONResponse:
        now_ms = parts.wall_ms()
        hosts = [_host(record, now_ms) for record in parts.hosts.records]
        moves = await _last_moves(parts.moves)
        return JSONResponse({"hosts": hosts, "stale": parts.hosts.stale, "moves": moves})

    @router.get("/breakers")
    async def breakers() -> JSONResponse:
        tripped = {
            target: {
                "state": view.state.value,
                "wait_ms": view.wait_ms,
                "failures_in_a_row": view.failures_in_a_row,
            }
            for target, view in parts.breakers.tripped().items()
        }
        return JSONResponse({"tripped": tripped})

    @router.get("/decisions")
    async def decisions(
        limit: Annotated[int, Query(ge=1, le=TAIL_MAX)] = 50, after: str | None = None
    ) -> JSONResponse:
        """The newest first; with ``after`` what came since that entry, the oldest first."""
        if after is None:
            last = await parts.decisions.last_entry()
            return JSONResponse({"decisions": await parts.decisions.tail(limit), "last": last})
        try:
            last, records = await parts.decisions.read_after(after, limit)
        except ValueError as error:
            raise InvalidRequest("after", str(error)) from error
        return JSONResponse({"decisions": records, "last": last})

    return router


async def _last_moves(moves: MoveLog) -> list[dict[str, Any]] | None:
    """None: the store is away, so nobody knows. The hosts are still worth showing."""
    try:
        return await moves.last()
    except StateUnavailable:
        return None


def _expert(spec: ExpertSpec, parts: AdminParts) -> dict[str, Any]:
    records = parts.hosts.records
    return {
        "id": spec.id,
        "kind": spec.kind.value,
        "description": spec.description,
        "context_tokens": spec.context_tokens,
        "capabilities": sorted(c.value for c in spec.capabilities),
        "tags": sorted(spec.tags),
        "input_usd_per_mtok": spec.price.input_micro_usd_per_mtok / MICRO_USD_PER_USD,
        "output_usd_per_mtok": spec.price.output_micro_usd_per_mtok / MICRO_USD_PER_USD,
        "hosted": spec.kind is SourceKind.WEIGHTS,
        "hosts": [r.host_id for r in records if r.serves(spec.id)],
        "resident_on": [r.host_id for r in records if r.resident == spec.id],
        "waiting": sum(r.queue_depths.get(spec.id, 0) for r in records),
        "out_of_service": {
            r.host_id: r.out_of_service[spec.id] for r in records if spec.id in r.out_of_service
        },
        "breaker_open": expert_target(spec.id) in parts.breakers.tripped(),
    }


def _host(record: HostRecord, now_ms: int) -> dict[str, Any]:
    return {
        "id": record.host_id,
        "url": record.url,
        "state": record.slot_state,
        "resident": record.resident,
        "experts": list(record.experts),
        "in_flight": record.in_flight,
        "queued": dict(record.queue_depths),
        "swap_ms": dict(record.swap_ms),
        "out_of_service": dict(record.out_of_service),
        "pool_bytes": record.pool_bytes,
        "pooled_bytes": record.pooled_bytes,
        "pools": [_pool(pool) for pool in record.pools],
        "load_ms": record.load_ms or None,
        "moving": record.moving,
        "heartbeat_age_ms": max(0, now_ms - record.heartbeat_ms),
        "up_ms": max(0, now_ms - record.started_ms),
    }


def _pool(pool: PoolRecord) -> dict[str, Any]:
    return {
        "architecture": pool.group,
        "limit_bytes": pool.limit_bytes,
        "entry_bytes": pool.entry_bytes,
        "used_bytes": pool.entry_bytes * len(pool.pooled),
        "pooled": list(pool.pooled),
        "experts": list(pool.experts),
    }
