"""Fixed placements for mean demand: experts to slots."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from deployments.simulate.cluster import Cluster
from deployments.simulate.workload import Workload

__all__ = ["copies_for_demand", "dealt_to_slots", "slot_capacity_rps"]


def slot_capacity_rps(cluster: Cluster, workload: Workload) -> float:
    """Requests per second that one engine sustains at the workload's mean token counts."""
    count = max(1, len(workload.arrivals))
    inputs = sum(arrival.input_tokens for arrival in workload.arrivals) / count
    outputs = sum(arrival.output_tokens for arrival in workload.arrivals) / count
    return cluster.engine.requests_per_s(max(inputs, 1.0), max(outputs, 1.0))


def copies_for_demand(rates_rps: Mapping[str, float], slots: int, capacity_rps: float) -> list[str]:
    """One expert per slot such that the served mean demand, sum of min(rate, copies x capacity), is
    greatest. The sum is concave in the copies of each expert, so taking the greatest gain first is
    exact. When no demand is left over, the most loaded copies are doubled.
    """
    copies = dict.fromkeys(rates_rps, 0)
    placed = []
    for _ in range(slots):
        best = max(copies, key=lambda e: _gain(rates_rps[e], copies[e], capacity_rps))
        copies[best] += 1
        placed.append(best)
    return placed


def dealt_to_slots(rates_rps: Mapping[str, float], slots: int) -> dict[str, int]:
    """Every expert to one slot, the busiest first to the slot with the least demand so far."""
    loads = [(0.0, slot) for slot in range(slots)]
    heapq.heapify(loads)
    dealt = {}
    for expert in sorted(rates_rps, key=lambda e: (-rates_rps[e], e)):
        load, slot = heapq.heappop(loads)
        dealt[expert] = slot
        heapq.heappush(loads, (load + rates_rps[expert], slot))
    return dealt


def _gain(rate: float, copies: int, capacity: float) -> tuple[float, float]:
    """Demand that one more copy serves; then the load that it takes off each of the others."""
    served = min(rate, (copies + 1) * capacity) - min(rate, copies * capacity)
    return served, rate / (copies + 1)
