"""The described cluster: accelerators, memory, links and how fast an engine makes tokens.

One architecture: every expert has the same size and speed, as the experts of one engine do. The
model of an engine is in ``engine``; what a swap takes is decided here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from deployments.swap.config import SchedulerConfig
from experts.errors import ConfigError
from experts.quantities import SizeBytes
from experts.strict_yaml import Section, load_model

__all__ = [
    "Accelerators",
    "Cluster",
    "EngineSpeed",
    "ExpertSize",
    "HostMemory",
    "Link",
    "SchedulerSettings",
    "cluster_json_schema",
    "load_cluster",
    "shipped_cluster",
]

_GB = 1e9
_SHIPPED = SchedulerConfig()
Bandwidth = Annotated[float, Field(gt=0, le=1e6, description="10^9 bytes per second")]
TokenRate = Annotated[float, Field(gt=0, le=1e9)]


class Accelerators(Section):
    """``kv_reserve_bytes``: device memory kept per engine for its cache and activations."""

    count: int = Field(ge=1, le=4096)
    device_bytes: SizeBytes
    kv_reserve_bytes: SizeBytes
    engines_per_accelerator: int = Field(1, ge=1, le=64)
    usd_per_hour: float = Field(ge=0, le=1e6, description="Price of one accelerator")


class Link(Section):
    """Host memory to one accelerator; each accelerator has its own.

    ``efficiency``: share of the bandwidth that a copy of a whole expert reaches. ``swap_fixed_ms``:
    what a swap costs beside the copy (pausing, the cache reset, the canary).
    """

    gigabytes_per_s: Bandwidth
    efficiency: float = Field(1.0, gt=0, le=1)
    swap_fixed_ms: float = Field(ge=0, le=1e6)


class HostMemory(Section):
    """The weight pool of one node, shared by its accelerators, and the node's disk behind it.

    ``count``: nodes. Accelerator a is in node a modulo the count.
    """

    count: int = Field(1, ge=1, le=1024)
    memory_bytes: SizeBytes
    disk_gigabytes_per_s: Bandwidth


class EngineSpeed(Section):
    """``decode_tokens_per_s``: all sequences together, of one alone and in the limit of many."""

    in_flight_max: int = Field(ge=1, le=4096)
    prefill_tokens_per_s: TokenRate
    decode_tokens_per_s_single: TokenRate
    decode_tokens_per_s_limit: TokenRate

    @model_validator(mode="after")
    def _saturates_upwards(self) -> EngineSpeed:
        if self.decode_tokens_per_s_limit < self.decode_tokens_per_s_single:
            raise ValueError("decode_tokens_per_s_limit must not be below that of a single one")
        return self

    def step_ms(self, batch: int) -> float:
        """Duration of one decode step of ``batch`` sequences: linear in the batch.

        The fixed part is reading the weights, the rest each sequence's own work, so that tokens per
        second rise with the batch and saturate.
        """
        each_ms = 1e3 / self.decode_tokens_per_s_limit
        return 1e3 / self.decode_tokens_per_s_single - each_ms + batch * each_ms

    def requests_per_s(self, input_tokens: float, output_tokens: float) -> float:
        """What one engine sustains with its batch full, of requests of this mean size."""
        decode_ms = output_tokens * self.step_ms(self.in_flight_max) / self.in_flight_max
        return 1e3 / (1e3 * input_tokens / self.prefill_tokens_per_s + decode_ms)


class ExpertSize(Section):
    count: int = Field(16, ge=1, le=10_000, description="Used where the command names no number")
    bytes: SizeBytes


class SchedulerSettings(Section):
    """Our scheduler's settings, for the policy ``ours``; defaults are the shipped ones."""

    age_bound_ms: float = Field(_SHIPPED.age_bound_ms, gt=0)
    min_residency_ms: float = Field(_SHIPPED.min_residency_ms, ge=0)
    min_residency_factor: float = Field(_SHIPPED.min_residency_factor, ge=0)
    min_residency_ms_max: float = Field(_SHIPPED.min_residency_ms_max, ge=0)
    drain_deadline_ms: float = Field(_SHIPPED.drain_deadline_ms, gt=0)

    @model_validator(mode="after")
    def _makes_a_config(self) -> SchedulerSettings:
        self.config()
        return self

    def config(self) -> SchedulerConfig:
        """Raises ValueError for settings that the scheduler refuses."""
        return SchedulerConfig(**self.model_dump())


class Cluster(Section):
    """One or several nodes. Engines are numbered from 0; engine e is on accelerator e mod count."""

    accelerators: Accelerators
    link: Link
    host: HostMemory
    engine: EngineSpeed
    experts: ExpertSize
    scheduler: SchedulerSettings = SchedulerSettings()

    @model_validator(mode="after")
    def _fits(self) -> Cluster:
        device = self.accelerators
        needed = device.engines_per_accelerator * (self.experts.bytes + device.kv_reserve_bytes)
        if needed > device.device_bytes:
            raise ValueError(
                f"{device.engines_per_accelerator} engines with their weights and cache need "
                f"{needed} bytes, the accelerator has {device.device_bytes}"
            )
        if self.host.count > device.count:
            raise ValueError("host.count must not exceed accelerators.count")
        if self.host.memory_bytes < self.experts.bytes:
            raise ValueError("host.memory_bytes must hold at least one expert")
        return self

    @property
    def engines(self) -> int:
        return self.accelerators.count * self.accelerators.engines_per_accelerator

    @property
    def pooled_max(self) -> int:
        """How many experts fit into host memory."""
        return self.host.memory_bytes // self.experts.bytes

    @property
    def copy_ms(self) -> float:
        """Host memory to accelerator, without the fixed part."""
        link = self.link
        return 1e3 * self.experts.bytes / (link.gigabytes_per_s * _GB * link.efficiency)

    @property
    def disk_ms(self) -> float:
        """Disk to host memory."""
        return 1e3 * self.experts.bytes / (self.host.disk_gigabytes_per_s * _GB)


def load_cluster(path: Path) -> Cluster:
    """Raises ConfigError with file, line and key for whatever is wrong."""
    return load_model(path, Cluster)


def shipped_cluster(name: str) -> Path:
    """The path of an example by its name without ``.yaml``. Raises ConfigError."""
    path = Path(__file__).parent / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(name, None, "", "there is no such example")
    return path


def cluster_json_schema() -> dict[str, Any]:
    """JSON Schema of a cluster file, for editors."""
    return Cluster.model_json_schema()
