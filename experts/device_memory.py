"""Do engines that take turns on one device fit it, with what sleepers leave behind? Pure.

An engine that sleeps keeps its CUDA context, kernel workspaces, communicators and graphs on the
device: about 1 GiB with small models and up to 8 GiB in published reports. The figures here are
measured on the running engines, not assumed: free memory before an engine started, with it awake,
and with it asleep.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_UTILIZATION_MAX = 0.9
_START_MARGIN_BYTES = 64 << 20  # free memory is read a moment before vLLM compares with it


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Of one device, in bytes; with tensor parallelism, of the fullest one."""

    free_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one engine occupies on the device, awake and asleep."""

    awake_bytes: int
    asleep_bytes: int


def footprint(before: DeviceMemory, awake: DeviceMemory, asleep: DeviceMemory) -> Footprint:
    """From three readings: before the engine started (all others asleep), awake, asleep."""
    return Footprint(
        awake_bytes=max(0, before.free_bytes - awake.free_bytes),
        asleep_bytes=max(0, before.free_bytes - asleep.free_bytes),
    )


def start_utilization(memory: DeviceMemory) -> float:
    """vLLM's ``gpu_memory_utilization`` for one more engine beside the sleepers.

    vLLM refuses to start when this share of the whole device is not free, also when the size of the
    cache is fixed; so it is what is free, and never more than the usual 0.9.
    """
    free = max(0, memory.free_bytes - _START_MARGIN_BYTES) / memory.total_bytes
    return min(_UTILIZATION_MAX, int(free * 1000) / 1000)


def shortfalls(total_bytes: int, engines: Mapping[str, Footprint]) -> dict[str, int]:
    """Engine -> bytes that are missing for it to be awake while all others sleep.

    Empty when every engine can have its turn. An engine that could start while its successors did
    not exist yet may no longer be able to wake beside what they leave behind.
    """
    residue = sum(engine.asleep_bytes for engine in engines.values())
    missing = {
        name: engine.awake_bytes + residue - engine.asleep_bytes - total_bytes
        for name, engine in engines.items()
    }
    return {name: short for name, short in missing.items() if short > 0}


def pool_shares(limit_bytes: int, weights_bytes: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Host memory for each engine's pool, out of ``limit_bytes``.

    ``weights_bytes``: engine -> expert -> size. Every engine gets room for its largest expert, so
    that it can run at all, and what is left is divided in proportion to the other experts' sizes.
    An engine whose largest expert finds no room gets 0, and its experts have to be refused.
    """
    shares: dict[str, int] = {}
    left = limit_bytes
    for engine, experts in weights_bytes.items():
        shares[engine] = max(experts.values()) if max(experts.values()) <= left else 0
        left -= shares[engine]
    others = {e: sum(weights_bytes[e].values()) - share for e, share in shares.items() if share}
    total = sum(others.values())
    for engine, size in others.items():
        shares[engine] += left * size // total if total else left // len(others)
    return shares
