"""The ``hosts`` section of coe.yaml: what one expert host runs with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from deployments.swap.config import SchedulerConfig
from experts.catalogue import Identifier
from experts.quantities import SizeBytes
from experts.strict_yaml import Section

MIB = 2**20
GIB = 2**30

Milliseconds = Annotated[int, Field(ge=0, le=86_400_000)]


class EngineSection(Section):
    """How a host runs vLLM: one engine for all experts of one architecture. Sizes are per engine;
    engines of several architectures take turns on the device."""

    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    max_model_len: int = Field(2048, ge=16, le=10_000_000)
    kv_cache_bytes: SizeBytes = Field(512 * MIB, ge=MIB)
    max_num_seqs: int = Field(16, ge=1, le=4096)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensor_parallel: int = Field(1, ge=1, le=64)


class PoolSection(Section):
    """The weight pool in host memory."""

    host_memory_bytes: SizeBytes = Field(4 * GIB, ge=MIB)


class SchedulerSection(Section):
    """The swap scheduler's bounds.

    A request older than ``age_bound_ms`` closes admission to the resident expert; an expert stays
    at least ``min_residency_ms``; running generations get ``drain_deadline_ms`` to finish. Nobody
    waits longer than ``queue_wait_ms_max``, or where that is null, than age bound, drain deadline
    and one swap: a request is refused at once when that is foreseen, else when it has waited as
    long.
    """

    queue_max: int = Field(256, ge=1, le=1_000_000)
    in_flight_max: int = Field(16, ge=1, le=4096)
    age_bound_ms: Milliseconds = 3000
    min_residency_ms: Milliseconds = 500
    drain_deadline_ms: Milliseconds = 15_000
    queue_wait_ms_max: int | None = Field(None, ge=1, le=86_400_000)

    def config(self) -> SchedulerConfig:
        """Raises ValueError for settings that the scheduler refuses."""
        return SchedulerConfig(**self.model_dump())

    @model_validator(mode="after")
    def _residency_below_age_bound(self) -> SchedulerSection:
        if self.min_residency_ms > self.age_bound_ms:
            raise ValueError(
                f"min_residency_ms ({self.min_residency_ms}) exceeds age_bound_ms "
                f"({self.age_bound_ms}), so the age bound could not be kept"
            )
        self.config()
        return self


class CanarySection(Section):
    """The check after every swap."""

    enabled: bool = True
    prompt: str = Field("The capital of France is", min_length=1, max_length=2000)


class HostConfig(Section):
    """One accelerator slot and the experts it may hold.

    Experts of one architecture share an engine; one more engine runs for each other architecture,
    asleep while it is not needed, up to ``engines_max``.
    """

    name: Identifier
    experts: tuple[str, ...] = Field(min_length=1)
    engines_max: int = Field(4, ge=1, le=16)
    engine: EngineSection = EngineSection()
    pool: PoolSection = PoolSection()
    scheduler: SchedulerSection = SchedulerSection()
    canary: CanarySection = CanarySection()
    port: int = Field(0, ge=0, le=65_535, description="0: any free port.")
