"""What the age bound promises, checked in the world after every event.

In a turn of its own: when a request ages while the slot serves another expert whose minimum
residency is over, admission closes at that instant, the slot turns to the oldest aged request's
expert, and a request among the first batch of those that the closing was in time for starts within
age bound + drain deadline + one swap of its arrival. Void: a begun answer that outlasts the drain
deadline (it is never cut), a swap that fails, an expert taken out of service.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deployments.swap.states import SlotPhase

if TYPE_CHECKING:
    from tests.sim.world import Client, World

_ROUNDING_MS = 1e-3


class Promises:
    """One life of one host. ``look`` after every event; ``swap_begins`` and ``broken`` as named."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._late_ms = world.rates.timer_late_ms + _ROUNDING_MS
        self._due_ms: dict[str, float] = {}
        self._draining = False
        self._drain_began_ms = 0.0

    def look(self) -> None:
        phase = self._world.scheduler.phase
        if phase is SlotPhase.SERVING:
            self._check_admission()
        began = phase is SlotPhase.DRAINING and not self._draining
        self._draining = phase is SlotPhase.DRAINING
        if began:
            self._drain_began_ms = self._world.now_ms
            self._closed_for(self._world.scheduler.snapshot().target)
        if self._draining:
            self._check_drain()
        for name in self._due_ms.keys() - self._world.waiting:
            del self._due_ms[name]
        for name, due_ms in self._due_ms.items():
            self._world.expect(self._world.now_ms <= due_ms, f"{name} starved in its own turn")

    def started(self, client: Client) -> None:
        if client.id in self._due_ms:
            self._world.counts["started within the bound as worded"] += 1

    def refused(self, client: Client) -> None:
        """It has waited age bound and drain deadline; its turn must not be under way."""
        drained_ms = self._world.now_ms - self._drain_began_ms
        running = (self._world.clients[name] for name in self._world.running)
        held_up = any(c.sent or (c.aborts > 0 and not c.stopping) for c in running)
        due = client.id in self._due_ms and self._draining and not held_up
        self._world.expect(
            not due or drained_ms > self._drain_ms_max(), f"{client.id} refused before its turn"
        )

    def swap_begins(self) -> None:
        if self._world.now_ms - self._drain_began_ms > self._drain_ms_max():
            self._due_ms.clear()  # a begun answer has outlasted it

    def broken(self) -> None:
        """A swap failed or an expert was retired: nothing is promised."""
        self._due_ms.clear()

    def _check_admission(self) -> None:
        """Nobody who may turn the slot finds it still open to its resident."""
        world, config = self._world, self._world.rates.config
        oldest = self._oldest_other()
        if oldest is None or not world.running:
            return
        stays_ms = world.resident_since_ms + world.rates.residency_ms_max
        due_ms = max(oldest.arrived_ms + config.age_bound_ms, stays_ms)
        world.expect(
            world.now_ms <= due_ms + self._late_ms, f"{oldest.id} starved: admission is still open"
        )

    def _closed_for(self, target: str | None) -> None:
        world, config = self._world, self._world.rates.config
        oldest = self._oldest_other()
        if target is None or oldest is None or world.resident in world.retired:
            return
        if oldest.arrived_ms + config.age_bound_ms <= world.now_ms:
            world.expect(target == oldest.expert, f"{oldest.id} starved: it is older than {target}")
        lane = sorted(
            (c for name in world.waiting if (c := world.clients[name]).expert == target),
            key=lambda client: client.arrived_ms,
        )
        for client in lane[: config.in_flight_max]:
            aged_ms = client.arrived_ms + config.age_bound_ms
            if client.aborts == 0 and aged_ms <= world.now_ms <= aged_ms + self._late_ms:
                limit_ms = self._drain_ms_max() + world.rates.swap_ms_max + self._late_ms
                self._due_ms[client.id] = aged_ms + self._late_ms + limit_ms

    def _check_drain(self) -> None:
        """Past its deadline a drain waits only for what has begun to answer or was aborted before,
        and then it promises nothing. Abort and timer take their moment.
        """
        world = self._world
        if world.now_ms - self._drain_began_ms <= self._drain_ms_max():
            return
        for name in world.running:
            client = world.clients[name]
            may_stay = client.sent or client.aborts > 0
            world.expect(may_stay, f"{name} holds up a drain and has sent nothing")
        self._due_ms.clear()

    def _drain_ms_max(self) -> float:
        rates = self._world.rates
        return rates.config.drain_deadline_ms + rates.abort_ms + self._late_ms

    def _oldest_other(self) -> Client | None:
        """The oldest request that waits for an expert other than the resident."""
        world = self._world
        clients = (world.clients[name] for name in world.waiting)
        others = [client for client in clients if client.expert != world.resident]
        return min(others, key=lambda client: client.arrived_ms, default=None)
