"""``coe status``: what the gateway says of itself, and what the store says of hosts and experts.

The gateway is asked for its readiness; hosts, the weights they hold and the last moves of placement
are read where every gateway reads them, in the store. Either can be away: the other is still shown.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from experts.errors import StateUnavailable
from gateway.ask import CommandFailed

if TYPE_CHECKING:
    from deployments.host_record import HostRecord
    from deployments.store import StateStore
    from gateway.config import Config

__all__ = ["cluster_view", "show_status", "view_of_store"]

_MOVES_SHOWN = 5
_GIB = 2**30


def view_of_store(path: Path | None, config: Config) -> dict[str, Any]:
    """``cluster_view`` of the configuration's store; ``{"store": why}`` when it cannot be read."""
    from gateway.keys_command import with_store

    names = tuple(spec.id for spec in config.catalogue.specs)
    try:
        return with_store(path, config, lambda store: _read(store, names))
    except (CommandFailed, StateUnavailable) as error:
        return {"store": str(error)}


async def _read(store: StateStore, experts: Sequence[str]) -> dict[str, Any]:
    from deployments.registry import HostRegistry
    from gateway.state.moves import MoveLog

    snapshot = await HostRegistry(store).snapshot()
    moves = await MoveLog(store).last()
    return cluster_view(experts, snapshot.records, moves, int(time.time() * 1000))


def cluster_view(
    experts: Sequence[str],
    records: Sequence[HostRecord],
    moves: Sequence[Mapping[str, Any]],
    now_ms: int,
) -> dict[str, Any]:
    """Hosts, experts and the newest moves as JSON-ready builtins. Pure.

    ``now_ms``: since the epoch, by a clock that agrees with the hosts'.
    """
    return {
        "hosts": [
            {
                "host": record.host_id,
                "state": record.slot_state,
                "resident": record.resident,
                "running": record.in_flight,
                "waiting": sum(record.queue_depths.values()),
                "pooled": sorted(record.pooled),
                "pooled_bytes": record.pooled_bytes,
                "pool_bytes": record.pool_bytes,
                "moving": record.moving,
                "heartbeat_age_ms": max(0, now_ms - record.heartbeat_ms),
            }
            for record in records
        ],
        "experts": [_expert(name, records) for name in experts],
        "moves": [dict(move) for move in moves[:_MOVES_SHOWN]],
    }


def _expert(name: str, records: Sequence[HostRecord]) -> dict[str, Any]:
    return {
        "expert": name,
        "hosts": [record.host_id for record in records if record.serves(name)],
        "resident_on": [record.host_id for record in records if record.resident == name],
        "waiting": sum(record.queue_depths.get(name, 0) for record in records),
        "out_of_service": {
            record.host_id: record.out_of_service[name]
            for record in records
            if name in record.out_of_service
        },
    }


def show_status(base: str, status: Mapping[str, Any]) -> None:
    """The whole report for a person. ``base``: the gateway's address."""
    console = Console()
    console.print(f"{base}: [bold]{status.get('status')}[/bold]")
    for kind in ("missing", "degraded"):
        for name, why in (status.get(kind) or {}).items():
            console.print(f"  {kind:<9} {name}: {why}")
    if (why := status.get("store")) is not None:
        console.print(f"hosts and experts are not known: {why}")
    if status.get("hosts"):
        console.print(_hosts_table(status["hosts"]))
    if status.get("experts"):
        console.print(_experts_table(status["experts"]))
    for move in status.get("moves") or ():
        console.print(_move_line(move))


def _hosts_table(hosts: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("host", "state", "resident", "running", "waiting", "in memory", "heard of")
    for host in hosts:
        memory = f"{len(host['pooled'])} experts"
        if host["pool_bytes"]:
            memory += f", {host['pooled_bytes'] / _GIB:.1f} of {host['pool_bytes'] / _GIB:.1f} GiB"
        if host["moving"]:
            memory += f", moving {host['moving']}"
        table.add_row(
            host["host"],
            host["state"],
            host["resident"] or "-",
            str(host["running"]),
            str(host["waiting"]),
            memory,
            f"{host['heartbeat_age_ms'] / 1000:.1f} s ago",
        )
    return table


def _experts_table(experts: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("expert", "hosts", "resident on", "waiting", "out of service")
    for expert in experts:
        table.add_row(
            expert["expert"],
            ", ".join(expert["hosts"]) or "-",
            ", ".join(expert["resident_on"]) or "-",
            str(expert["waiting"]),
            "; ".join(f"{host}: {why}" for host, why in expert["out_of_service"].items()),
        )
    return table


def _move_line(move: Mapping[str, Any]) -> str:
    moment = datetime.datetime.fromtimestamp(move["ended_ms"] / 1000, datetime.UTC)
    why = f" ({move['reason']})" if move["reason"] else ""
    return (
        f"{moment:%H:%M:%S}  {move['kind']} {move['expert']} at {move['host']}: "
        f"{move['outcome']}{why}, {move['took_ms']:.0f} ms"
    )
