"""What a host tells the gateways about itself: a plain record, its JSON form, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

SERVING = "serving"  # the slot state in which the resident expert takes requests
DRAINING = "draining"  # it finishes what it runs and takes nothing new
SWAPPING = "swapping"
EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """One engine's part of a host's weight pool.

    ``group``: digest of the architecture; experts of one group can share an engine, on any host.
    ``limit_bytes`` bounds the entries, each of which takes ``entry_bytes``. ``experts``: all that
    the engine can run; ``pooled``: those whose weights are in host memory now.
    """

    group: str
    limit_bytes: int
    entry_bytes: int
    experts: tuple[str, ...]
    pooled: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HostRecord:
    """A host as of ``heartbeat_ms`` (the host's wall clock, milliseconds since the epoch).

    ``queue_depths`` counts waiting requests per expert; experts without any may be left out.
    ``swap_ms`` holds measured swap times only. ``out_of_service`` maps an expert to the reason.
    ``slot_state`` is the swap scheduler's phase: empty, serving, draining or swapping.
    ``queued_request_ms``: how much one waiting request delays the next, as measured by the host;
    0 means not measured. ``started_ms`` tells one life of a host from the next.

    For placement: ``pools`` is empty when the host says nothing of its memory. ``slots``: engines
    that serve at a time. ``work``: expert -> requests begun and milliseconds of the slot that they
    kept busy, since the host's start. ``load_ms``: the newest load from disk into host memory; 0
    means not measured. ``moving``: the expert of a placement command under way.
    """

    host_id: str
    url: str
    experts: tuple[str, ...]
    resident: str | None = None
    queue_depths: Mapping[str, int] = field(default_factory=dict)
    in_flight: int = 0
    swap_ms: Mapping[str, float] = field(default_factory=dict)
    out_of_service: Mapping[str, str] = field(default_factory=dict)
    slot_state: str = SERVING
    heartbeat_ms: int = 0
    started_ms: int = 0
    version: str = ""
    queued_request_ms: float = 0.0
    pools: tuple[PoolRecord, ...] = ()
    slots: int = 1
    work: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    load_ms: float = 0.0
    moving: str | None = None

    @property
    def pool_bytes(self) -> int:
        """The bound of the host's weight pool, all engines together."""
        return sum(pool.limit_bytes for pool in self.pools)

    @property
    def pooled_bytes(self) -> int:
        """Host memory that experts' weights take now."""
        return sum(pool.entry_bytes * len(pool.pooled) for pool in self.pools)

    @property
    def pooled(self) -> frozenset[str]:
        """Experts whose weights are in host memory now."""
        return frozenset(expert for pool in self.pools for expert in pool.pooled)

    def reads_disk_for(self, expert: str) -> bool:
        """Whether making the expert resident here begins with reading its weights from disk, as far
        as the host says anything about it."""
        return bool(self.pools) and not any(expert in pool.pooled for pool in self.pools)

    def serves(self, expert: str) -> bool:
        """Whether the expert is placed here and not out of service."""
        return expert in self.experts and expert not in self.out_of_service


@dataclass(frozen=True, slots=True)
class RegistrySnapshot:
    """All live hosts at one moment.

    ``epoch`` changes when the store has lost what it knew (a restart without persistence): hosts
    that are missing then may be alive and merely not yet registered again.
    """

    epoch: int
    records: tuple[HostRecord, ...]


_DECODER = msgspec.json.Decoder(HostRecord)


def encode_record(record: HostRecord) -> dict[str, Any]:
    """The record as JSON-ready builtins."""
    builtins: dict[str, Any] = msgspec.to_builtins(record)
    return builtins


def record_to_json(record: HostRecord) -> bytes:
    return msgspec.json.encode(record)


def record_from_json(raw: bytes) -> HostRecord:
    """Fields that nobody here knows are ignored, so that newer hosts can join older gateways.

    Raises msgspec.DecodeError for anything that is not a host record.
    """
    return _DECODER.decode(raw)
