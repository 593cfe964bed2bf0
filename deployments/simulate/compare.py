"""All policies on identical arrivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from deployments.simulate.clairvoyant import Clairvoyant
from deployments.simulate.cluster import Cluster
from deployments.simulate.fcfs_lru import FcfsLru
from deployments.simulate.floor import Floor, Policy, replay
from deployments.simulate.llama_swap import LlamaSwap
from deployments.simulate.metrics import PolicyResult, judge
from deployments.simulate.ollama import Ollama
from deployments.simulate.ours import Ours
from deployments.simulate.static import Static
from deployments.simulate.workload import Workload

__all__ = ["CLAIRVOYANT", "POLICIES", "Comparison", "Objectives", "compare", "make_policy"]

CLAIRVOYANT = "clairvoyant"
POLICIES = ("ours", "fcfs_lru", "llama_swap", "ollama", "static", CLAIRVOYANT)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Objectives:
    """``ttft_ms``: a first token later than this is not good. ``patience_ms``: how long a caller
    waits for its request to start; the same for every policy, and the only bound of any queue.
    """

    ttft_ms: float = 5_000.0
    patience_ms: float = 120_000.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """``planner``: the clairvoyant planner's own figures. ``clairvoyant_plan``: whose schedule the
    clairvoyant row is: ``planner``, or the policy that no plan of it beat.
    """

    policies: dict[str, PolicyResult]
    planner: PolicyResult
    clairvoyant_plan: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def make_policy(name: str, workload: Workload) -> Callable[[Floor], Policy]:
    """What ``replay`` needs to make the policy of this name. Raises KeyError for another."""
    makers: dict[str, Callable[[Floor], Policy]] = {
        "ours": Ours,
        "fcfs_lru": FcfsLru,
        "llama_swap": lambda floor: LlamaSwap(floor, workload),
        "ollama": Ollama,
        "static": lambda floor: Static(floor, workload),
        CLAIRVOYANT: lambda floor: Clairvoyant(floor, workload),
    }
    return makers[name]


def compare(
    cluster: Cluster,
    workload: Workload,
    objectives: Objectives,
    progress: Progress | None = None,
) -> Comparison:
    """Replay every policy. ``progress(policy, arrivals so far, arrivals)``: called now and then."""
    results: dict[str, PolicyResult] = {}
    for name in POLICIES:
        make = make_policy(name, workload)
        results[name] = _replay_one(cluster, workload, objectives, name, make, progress)
    planner = results[CLAIRVOYANT]
    best = max(POLICIES, key=lambda name: (_rank(results[name]), name == CLAIRVOYANT))
    results[CLAIRVOYANT] = results[best]
    plan = "planner" if best == CLAIRVOYANT else best
    return Comparison(results, planner, plan)


def _rank(result: PolicyResult) -> tuple[float, float]:
    return (result.goodput, -result.p95_wait_s)


def _replay_one(
    cluster: Cluster,
    workload: Workload,
    objectives: Objectives,
    name: str,
    make: Callable[[Floor], Policy],
    progress: Progress | None,
) -> PolicyResult:
    total = len(workload.arrivals)

    def note(done: int) -> None:
        if progress is not None:
            progress(name, done, total)

    tally = replay(cluster, workload, make, patience_ms=objectives.patience_ms, progress=note)
    note(total)
    return judge(
        tally,
        workload,
        cluster,
        ttft_objective_ms=objectives.ttft_ms,
        patience_ms=objectives.patience_ms,
    )
