"""Weights in the memory of the nodes, and the disks that they come from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence

from deployments.simulate.cluster import Cluster

__all__ = ["NodeMemory"]


class NodeMemory:
    """Which experts each node holds, least recently used first, and when its disk is free.

    All experts are equal in size and in cost, so the least recently used one leaves. A disk reads
    one expert at a time.
    """

    def __init__(self, cluster: Cluster, experts: Sequence[str]) -> None:
        self._places = cluster.pooled_max
        self._disk_ms = cluster.disk_ms
        self._disk_free_ms = [0.0] * cluster.host.count
        self._held: list[OrderedDict[str, None]] = []
        for _ in range(cluster.host.count):
            first = reversed(experts[: self._places])
            self._held.append(OrderedDict.fromkeys(first))
        self.disk_loads = 0

    def held(self, node: int) -> frozenset[str]:
        return frozenset(self._held[node])

    def fill(self, node: int, experts: Sequence[str]) -> None:
        """Replace what the node holds. Raises ValueError when that is too much."""
        if len(experts) > self._places:
            raise ValueError(f"{len(experts)} experts in {self._places} places")
        self._held[node] = OrderedDict.fromkeys(experts)

    def drop(self, node: int, expert: str) -> None:
        self._held[node].pop(expert, None)

    def touch(self, node: int, expert: str) -> None:
        """The expert is in memory now, and used."""
        held = self._held[node]
        held[expert] = None
        held.move_to_end(expert)
        while len(held) > self._places:
            held.popitem(last=False)

    def ready_ms(self, node: int, expert: str, now_ms: float) -> float:
        """When the expert is in memory, read from disk if need be. Reserves nothing."""
        if expert in self._held[node]:
            return now_ms
        return max(now_ms, self._disk_free_ms[node]) + self._disk_ms

    def fetch(self, node: int, expert: str, now_ms: float) -> None:
        """Bring the expert in for a swap that begins now."""
        if expert not in self._held[node]:
            self._read(node, expert, now_ms)
        self.touch(node, expert)

    def load(self, node: int, expert: str, keep: Collection[str], now_ms: float) -> float | None:
        """Begin to read the expert ahead of its swap; when it will be there. Who makes room leaves
        at once. None when it is there, or there is no room beside ``keep``.
        """
        held = self._held[node]
        leaving = [other for other in held if other not in keep]
        if expert in held or len(held) - len(leaving) >= self._places:
            return None
        for other in leaving[: max(0, len(held) + 1 - self._places)]:
            del held[other]
        return self._read(node, expert, now_ms)

    def _read(self, node: int, expert: str, now_ms: float) -> float:
        self._disk_free_ms[node] = self.ready_ms(node, expert, now_ms)
        self.disk_loads += 1
        return self._disk_free_ms[node]
