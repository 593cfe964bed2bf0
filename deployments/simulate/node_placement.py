"""Experts over several nodes, as ``deployments.placement`` plans it, while requests are served.

At the start nobody knows the demand, so every expert counts alike. Then, every ``MOVE_MS``, at most
one move of the whole cluster is made, by the demand measured so far: weights are read from the
node's own disk, and only when they are there does the node take requests for the expert. An expert
that has no place in any node's memory can still be asked for everywhere and comes from disk.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from deployments.placement import (
    ExpertNeed,
    HostRoom,
    MoveKind,
    PlacementConfig,
    apply_move,
    next_move,
    settle,
)
from deployments.simulate.floor import Floor
from deployments.simulate.gateway_view import GatewayView

__all__ = ["MOVE_MS", "NodePlacement"]

MOVE_MS = 5_000.0
MEMORY_MS = 120_000.0  # demand is remembered for about this long
_GROUP = "one"  # a described cluster has one architecture


class NodePlacement:
    """Single owner of which node holds what. ``moves`` counts what was done."""

    def __init__(
        self, floor: Floor, view: GatewayView, config: PlacementConfig | None = None
    ) -> None:
        self._floor = floor
        self._view = view
        self._config = config or PlacementConfig()
        self._work_ms = dict.fromkeys(floor.experts, 0.0)  # service begun, fading with time
        self._faded_ms = 0.0
        self._loading: tuple[int, str] | None = None
        self.moves = 0
        self._held = settle(self._needs(even=True), self._rooms(), config=self._config)
        for node in range(floor.nodes):
            floor.fill(node, sorted(self._held[str(node)]))
        self._show()

    def served(self, expert: str, service_ms: float) -> None:
        """A request for the expert has kept a place busy for so long."""
        self._fade()
        self._work_ms[expert] += service_ms

    def tick(self, pinned: Collection[tuple[int, str]]) -> None:
        """Make the next move, if there is one. ``pinned``: (node, expert) in use now."""
        if self._loading is not None:
            return
        self._fade()
        kept = {(str(node), expert) for node, expert in pinned}
        move = next_move(self._needs(), self._rooms(), self._held, self._config, kept)
        if move is None:
            return
        self.moves += 1
        node = int(move.host_id)
        if move.kind is MoveKind.POOL:
            self._loading = (node, move.expert)
            if not self._floor.load(node, move.expert, keep=self._held[move.host_id]):
                self.loaded(node, move.expert)  # a request has brought it from disk already
        else:
            self._held = apply_move(self._held, move)
            self._floor.drop(node, move.expert)
            self._show()

    def loaded(self, node: int, expert: str) -> None:
        """The weights are in the node's memory."""
        if self._loading != (node, expert):
            return
        self._loading = None
        self._held[str(node)] |= {expert}
        self._show()

    def _show(self) -> None:
        """Tell every slot's host what it serves."""
        placed = frozenset[str]().union(*self._held.values())
        homeless = [expert for expert in self._floor.experts if expert not in placed]
        for slot in self._floor.slots:
            held = self._held[str(self._floor.node_of(slot))]
            self._view.place(slot.number, [*sorted(held), *homeless])

    def _fade(self) -> None:
        now_ms = self._floor.now_ms
        share = math.exp(-(now_ms - self._faded_ms) / MEMORY_MS)
        if share < 0.99:  # not at every request
            self._work_ms = {expert: work * share for expert, work in self._work_ms.items()}
            self._faded_ms = now_ms

    def _needs(self, *, even: bool = False) -> list[ExpertNeed]:
        cluster = self._floor.cluster
        places_ms = MEMORY_MS * cluster.engine.in_flight_max
        return [
            ExpertNeed(expert, cluster.experts.bytes, _GROUP, 1.0 if even else work / places_ms)
            for expert, work in self._work_ms.items()
        ]

    def _rooms(self) -> list[HostRoom]:
        memory_bytes = self._floor.cluster.host.memory_bytes
        counts = [0] * self._floor.nodes
        for slot in self._floor.slots:
            counts[self._floor.node_of(slot)] += 1
        return [HostRoom(str(n), memory_bytes, slots) for n, slots in enumerate(counts)]
