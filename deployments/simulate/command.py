"""What ``coe simulate`` does: read, replay, judge; the result as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deployments.simulate.cluster import Cluster, load_cluster, shipped_cluster
from deployments.simulate.compare import Comparison, Objectives, Progress, compare
from deployments.simulate.placing import slot_capacity_rps
from deployments.simulate.trace_file import read_trace
from deployments.simulate.workload import RateTrace, Workload, from_rates, from_requests
from experts.errors import ConfigError

__all__ = ["ARRIVALS_MAX", "SimulateOptions", "simulate"]

ARRIVALS_MAX = 2_000_000
DEFAULT_CLUSTER = "h100_node"


@dataclass(frozen=True, slots=True)
class SimulateOptions:
    """``cluster``: a file, or the name of a shipped example. ``experts`` None: the cluster's."""

    trace: Path
    cluster: str = DEFAULT_CLUSTER
    experts: int | None = None
    seed: int = 0
    minutes: float = 30.0
    rate_scale: float = 1.0
    ttft_objective_s: float = 5.0
    patience_s: float = 120.0
    zipf_exponent: float = 1.0


def simulate(options: SimulateOptions, progress: Progress | None = None) -> dict[str, Any]:
    """All policies on the trace's arrivals. Equal options give an equal result.

    Raises ConfigError for a trace or a cluster that does not fit.
    """
    path = Path(options.cluster)
    cluster = load_cluster(path if path.suffix else shipped_cluster(options.cluster))
    workload = _workload(options, options.experts or cluster.experts.count)
    objectives = Objectives(options.ttft_objective_s * 1e3, options.patience_s * 1e3)
    comparison = compare(cluster, workload, objectives, progress=progress)
    return _result(options, cluster, workload, comparison)


def _workload(options: SimulateOptions, experts: int) -> Workload:
    trace = read_trace(options.trace)
    horizon_s = options.minutes * 60.0
    if isinstance(trace, RateTrace):
        windows = min(trace.rate_rps.shape[1], int(horizon_s // trace.window_s) + 1)
        expected = trace.rate_rps[:, :windows].sum() * trace.window_s * options.rate_scale
        _check_size(options, float(expected))
        workload = from_rates(
            trace,
            experts=experts,
            horizon_s=horizon_s,
            rate_scale=options.rate_scale,
            seed=options.seed,
        )
    else:
        workload = from_requests(
            trace,
            experts=experts,
            horizon_s=horizon_s,
            rate_scale=options.rate_scale,
            seed=options.seed,
            zipf_exponent=options.zipf_exponent,
        )
    if not workload.arrivals:
        raise _wrong(options, "no request arrives within the horizon; raise --minutes")
    return workload


def _check_size(options: SimulateOptions, expected: float) -> None:
    if expected > ARRIVALS_MAX:
        reason = f"about {expected:.0f} requests, more than {ARRIVALS_MAX}; lower --rate-scale"
        raise _wrong(options, reason)


def _wrong(options: SimulateOptions, reason: str) -> ConfigError:
    return ConfigError(str(options.trace), None, "", reason)


def _result(
    options: SimulateOptions, cluster: Cluster, workload: Workload, comparison: Comparison
) -> dict[str, Any]:
    seconds = workload.horizon_ms / 1e3
    capacity_rps = slot_capacity_rps(cluster, workload) * cluster.engines
    return {
        **comparison.as_json(),
        "trace": options.trace.name,
        "cluster": options.cluster,
        "engines": cluster.engines,
        "experts": len(workload.experts),
        "active_experts": sum(count > 0 for count in workload.requests_of().values()),
        "requests": len(workload.arrivals),
        "horizon_s": seconds,
        "offered_load": len(workload.arrivals) / seconds / capacity_rps,
        "swap_s": (cluster.copy_ms + cluster.link.swap_fixed_ms) / 1e3,
        "options": {**asdict(options), "trace": options.trace.name},
        "seed": options.seed,
        "rate_scale": options.rate_scale,
        "ttft_objective_s": options.ttft_objective_s,
    }
