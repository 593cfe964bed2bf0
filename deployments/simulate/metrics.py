"""What a replay is judged by.

- **wait**: from arrival to the start on an engine. A request that was never served counts as having
  waited its caller's whole patience, so that refusing cannot make a policy look fast.
- **goodput**: share of all requests whose first token came within the objective.
- **hit rate**: share of served requests whose expert was resident, where they ran, since before
  they arrived.
- **fairness**: Jain's index (sum x)^2 / (n sum x^2) over the mean waits x of the n experts that had
  requests; 1 when all wait alike, 1/n when one expert does all the waiting, 1 when nobody waits. It
  judges evenness only: a policy under which almost nobody waits may well score low.
- **swaps_min**: the fewest swaps with which the requests could have been started in the same order
  (``belady``); ``swaps`` over it is what the policy's choice of victims, its copies and its drains
  cost.
- **cost**: all accelerators for the length of the run (until the last request ended, at least the
  horizon), per million tokens, of all served requests and of those within the objective.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from deployments.simulate.belady import fewest_swaps
from deployments.simulate.cluster import Cluster
from deployments.simulate.floor import Tally
from deployments.simulate.job import Job, JobState
from deployments.simulate.workload import Workload

__all__ = ["PolicyResult", "jain_index", "judge"]

_MICRO_USD_PER_USD = 1_000_000
_MS_PER_HOUR = 3_600_000.0
QUANTILES = 101


@dataclass(frozen=True, slots=True)
class PolicyResult:
    """One policy's figures. Times in seconds; ``cost_micro_usd_per_mtok*`` is None when no token
    counts. ``expert_wait_s``: each expert's p50, p95 and p99. ``wait_quantiles_s``: 0 %, 1 %, ...
    100 %.
    """

    requests: int
    served: int
    missed: int
    p50_wait_s: float
    p95_wait_s: float
    p99_wait_s: float
    max_wait_s: float
    mean_wait_s: float
    p95_ttft_s: float
    goodput: float
    swaps: int
    swaps_min: int
    disk_loads: int
    restarts: int
    hit_rate: float
    fairness: float
    cost_micro_usd_per_mtok: int | None
    cost_micro_usd_per_mtok_in_objective: int | None
    end_s: float
    expert_mean_wait_s: dict[str, float]
    expert_wait_s: dict[str, tuple[float, float, float]]
    expert_requests: dict[str, int]
    wait_quantiles_s: tuple[float, ...]


def judge(
    tally: Tally,
    workload: Workload,
    cluster: Cluster,
    *,
    ttft_objective_ms: float,
    patience_ms: float,
) -> PolicyResult:
    jobs = tally.jobs
    waits_s = np.array([_wait_ms(job, patience_ms) for job in jobs]) / 1e3
    ttfts_s = np.array([_ttft_ms(job, patience_ms) for job in jobs]) / 1e3
    served = [job for job in jobs if job.state is JobState.SERVED]
    timely = [job for job in served if job.first_token_ms - job.arrived_ms <= ttft_objective_ms]
    length_ms = max(workload.horizon_ms, tally.end_ms)
    per_expert = _by_expert(jobs, waits_s)
    means = {expert: float(np.mean(waits)) for expert, waits in per_expert.items()}
    return PolicyResult(
        requests=len(jobs),
        served=len(served),
        missed=len(jobs) - len(served),
        p50_wait_s=_percentile(waits_s, 50),
        p95_wait_s=_percentile(waits_s, 95),
        p99_wait_s=_percentile(waits_s, 99),
        max_wait_s=float(waits_s.max()) if jobs else 0.0,
        mean_wait_s=float(np.mean(waits_s)) if jobs else 0.0,
        p95_ttft_s=_percentile(ttfts_s, 95),
        goodput=len(timely) / max(1, len(jobs)),
        swaps=tally.swaps,
        swaps_min=fewest_swaps(_order(jobs), cluster.engines),
        disk_loads=tally.disk_loads,
        restarts=tally.stops,
        hit_rate=sum(job.hit for job in served) / max(1, len(served)),
        fairness=jain_index(list(means.values())),
        cost_micro_usd_per_mtok=_cost(cluster, length_ms, served),
        cost_micro_usd_per_mtok_in_objective=_cost(cluster, length_ms, timely),
        end_s=tally.end_ms / 1e3,
        expert_mean_wait_s=means,
        expert_wait_s={expert: _tail(waits) for expert, waits in per_expert.items()},
        expert_requests={expert: len(waits) for expert, waits in per_expert.items()},
        wait_quantiles_s=_quantiles(waits_s),
    )


def jain_index(values: Sequence[float]) -> float:
    """(sum x)^2 / (n sum x^2); 1 for no values, or when all are zero."""
    squares = sum(value * value for value in values)
    if squares == 0.0:
        return 1.0
    total = sum(values)
    return total * total / (len(values) * squares)


def _wait_ms(job: Job, patience_ms: float) -> float:
    if job.state is not JobState.SERVED:
        return patience_ms
    return job.started_ms - job.arrived_ms


def _ttft_ms(job: Job, patience_ms: float) -> float:
    if job.state is not JobState.SERVED:
        return patience_ms
    return job.first_token_ms - job.arrived_ms


def _order(jobs: Iterable[Job]) -> list[str]:
    """Experts in the order in which their requests last started."""
    started = [job for job in jobs if not math.isnan(job.started_ms)]
    started.sort(key=lambda job: job.started_ms)  # stable: among equals, in order of arrival
    return [job.expert for job in started]


def _tail(waits_s: Sequence[float]) -> tuple[float, float, float]:
    p50, p95, p99 = np.percentile(waits_s, (50, 95, 99))
    return float(p50), float(p95), float(p99)


def _by_expert(jobs: Iterable[Job], waits_s: Iterable[float]) -> dict[str, list[float]]:
    grouped: dict[str, list[float]] = {}
    for job, wait_s in zip(jobs, waits_s, strict=True):
        grouped.setdefault(job.expert, []).append(float(wait_s))
    return dict(sorted(grouped.items()))


def _percentile(values: np.ndarray[tuple[int], np.dtype[np.float64]], percent: float) -> float:
    return float(np.percentile(values, percent)) if len(values) else 0.0


def _quantiles(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, ...]:
    if not len(values):
        return ()
    return tuple(float(q) for q in np.percentile(values, np.linspace(0, 100, QUANTILES)))


def _cost(cluster: Cluster, length_ms: float, jobs: Sequence[Job]) -> int | None:
    """Micro-dollars per million tokens, rounded."""
    tokens = sum(job.input_tokens + job.output_tokens for job in jobs)
    if tokens == 0:
        return None
    hours = cluster.accelerators.count * length_ms / _MS_PER_HOUR
    usd = hours * cluster.accelerators.usd_per_hour
    return round(usd * _MICRO_USD_PER_USD * 1e6 / tokens)
