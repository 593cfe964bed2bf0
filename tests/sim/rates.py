"""What each seed draws for itself: sizes, loads, settings and the chances of each fault."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from deployments.swap.config import SchedulerConfig
from deployments.swap.patience import LATE_MS


def rng_for(seed: int, concern: str) -> random.Random:
    """A generator of its own for every concern (a string seeds without per-process hashing)."""
    return random.Random(f"{seed}/{concern}")


@dataclass(frozen=True, slots=True)
class Rates:
    experts: tuple[str, ...]
    popularity: tuple[float, ...]
    config: SchedulerConfig
    requests: int
    between_arrivals_ms: float
    service_ms: float
    first_token_share: float
    swap_ms: float
    slow_chance: float
    slow_factor: float
    swap_fails_chance: float
    leaving_chance: float
    deadline_chance: float
    announce_chance: float
    priorities: tuple[int, ...]
    restarts: int
    retirements: int
    out_ms_max: float
    timer_late_ms: float
    abort_ms: float
    engines: dict[str, str]  # expert to engine; empty: one engine for all
    wake_ms: float
    residue: float  # share of the device that a sleeping engine keeps

    def draw_service_ms(self, rng: random.Random) -> float:
        return self.service_ms * min(4.0, rng.expovariate(1.0))

    def draw_limit_ms(self, rng: random.Random) -> float | None:
        return rng.uniform(0, 20 * self.swap_ms) if rng.random() < self.deadline_chance else None

    def draw_leaving_ms(self, rng: random.Random) -> float | None:
        """After how long a client breaks off; short enough to hit waits, swaps and streams."""
        if rng.random() >= self.leaving_chance:
            return None
        return rng.expovariate(1.0 / (self.swap_ms + self.service_ms))

    @property
    def swap_ms_max(self) -> float:
        swap_ms = self.swap_ms * 1.2 * (self.slow_factor if self.slow_chance else 1.0)
        return swap_ms + (2 * self.wake_ms if self.engines else 0.0)

    @property
    def residency_ms_max(self) -> float:
        """The longest stay that a turn can earn."""
        return self.config.residency_ms(self.swap_ms_max + 4 * self.service_ms)

    @property
    def turn_ms_max(self) -> float:
        """The longest that one turn can last: a swap, the stay it earns, and the drain."""
        drain_ms = 4 * self.service_ms + self.abort_ms
        stay_ms = self.config.residency_ms(self.swap_ms_max + drain_ms)
        return self.swap_ms_max + stay_ms + drain_ms + 4 * self.timer_late_ms

    @property
    def moments_ms(self) -> float:
        """What no scheduler can help: timers that are late, aborts that take a while."""
        return self.abort_ms + LATE_MS + self.timer_late_ms + 1e-3


def draw_rates(seed: int) -> Rates:
    """A quarter of the seeds set a longest wait; the others leave it at age bound, drain deadline
    and one swap."""
    rates = _draw_rates(seed)
    if rng_for(seed, "patience").random() < 0.25:
        return rates
    return replace(rates, config=replace(rates.config, queue_wait_ms_max=None))


def _draw_rates(seed: int) -> Rates:
    rng = rng_for(seed, "rates")

    def sometimes(chance: float, low: float, high: float) -> float:
        return rng.uniform(low, high) if rng.random() < chance else 0.0

    experts = tuple(f"e{n}" for n in range(rng.randint(1, 8)))
    service_ms = rng.uniform(50, 2_000)
    in_flight_max = rng.randint(1, 8)
    load = rng.choice((0.2, 0.6, 1.0, 2.0))  # 1: what a slot that never swaps can just serve
    return Rates(
        experts=experts,
        popularity=tuple(rng.choice((1.0, 1.0, 5.0, 40.0)) for _ in experts),
        config=_draw_config(rng, in_flight_max),
        requests=rng.randint(50, 350),
        between_arrivals_ms=service_ms / in_flight_max / load,
        service_ms=service_ms,
        first_token_share=rng.choice((0.1, 1.0)),
        swap_ms=rng.uniform(10, 1_500),
        slow_chance=sometimes(0.4, 0.02, 0.3),
        slow_factor=20.0,
        swap_fails_chance=sometimes(0.4, 0.02, 0.3),
        leaving_chance=sometimes(0.6, 0.02, 0.5),
        deadline_chance=sometimes(0.4, 0.1, 1.0),
        announce_chance=sometimes(0.3, 0.1, 0.5),
        priorities=rng.choice(((0,), (0, 0, 0, 3), (-4, -1, 0, 1, 4, 99))),
        restarts=rng.choice((0, 0, 1, 3)),
        retirements=rng.choice((0, 0, 0, 4)),
        out_ms_max=rng.uniform(100, 20_000),
        timer_late_ms=rng.choice((0.0, 0.0, 15.0)),
        abort_ms=rng.uniform(0, 200),
        **_draw_engines(rng_for(seed, "engines"), experts),
    )


def _draw_engines(rng: random.Random, experts: tuple[str, ...]) -> dict[str, Any]:
    """A third of the seeds run several architectures, whose engines sleep in turn."""
    count = rng.choice((1, 1, 2, 3))
    engines = {expert: f"engine {rng.randrange(count)}" for expert in experts}
    return {
        "engines": engines if count > 1 else {},
        "wake_ms": rng.uniform(50, 2_000),
        "residue": rng.uniform(0.0, 0.1),
    }


def _draw_config(rng: random.Random, in_flight_max: int) -> SchedulerConfig:
    residency_ms = rng.choice((0.0, 50.0, 800.0))
    return SchedulerConfig(
        queue_max=rng.choice((4, 16, 64)),
        in_flight_max=in_flight_max,
        age_bound_ms=rng.uniform(200, 3_000),
        min_residency_ms=residency_ms,
        min_residency_factor=rng.choice((0.0, 1.0, 2.0)),
        min_residency_ms_max=rng.choice((residency_ms, 5_000.0)),
        drain_deadline_ms=rng.uniform(50, 3_000),
        queue_wait_ms_max=rng.choice((20_000.0, 10_000_000.0)),
        announce_ttl_ms=2_000.0,
        measure_ttl_ms=rng.choice((5_000.0, 300_000.0)),
    )
