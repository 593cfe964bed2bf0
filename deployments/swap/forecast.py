"""How long a new request would wait, from measured swaps, measured service and the queues.

The slot is pictured as a round: what it does now, then a turn for each expert whose oldest request
waits longer than ours, then our own swap, then the requests before ours. A duration that nobody has
measured counts as zero: a guess must never turn a request away, and the first request through is
what makes the measurement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from deployments.swap.config import SchedulerConfig
from deployments.swap.lanes import Lane
from deployments.swap.measures import Measured
from deployments.swap.slot import Slot
from deployments.swap.states import SlotPhase

__all__ = ["Forecast"]


@dataclass(frozen=True, slots=True)
class Forecast:
    """A reader of the scheduler's state; it owns and changes nothing.

    ``waiting`` holds the lanes that are not empty. ``any_swap`` averages over all experts: those of
    one slot have one architecture, so what one swap took is the best guess for another.
    ``drain_ms_max``: a drain is taken to last at most as long.
    """

    config: SchedulerConfig
    slot: Slot
    lanes: Mapping[str, Lane]
    waiting: Mapping[str, Lane]
    any_swap: Measured
    service: Measured
    drain_ms_max: float = math.inf

    def wait_ms(self, expert: str, priority: int, now_ms: float) -> float:
        """Expected time from ``now_ms`` to a grant; infinite when the expert is out of service."""
        lane = self.lanes[expert]
        if lane.out_of_service is not None:
            return math.inf
        if self.slot.phase is SlotPhase.SERVING and self.slot.resident == expert:
            return self._resident_wait_ms(lane, priority, now_ms)
        own_swap_ms = self.swap_ms(lane, now_ms)
        queue_ms = self._batches_ms(lane.ahead_of(priority), now_ms)
        if self.slot.target == expert:
            return self._target_lead_ms(lane, now_ms) + queue_ms
        lead_ms = self._lead_ms(lane, now_ms)
        return lead_ms + self._turns_ms(lane, now_ms) + own_swap_ms + queue_ms

    def _resident_wait_ms(self, lane: Lane, priority: int, now_ms: float) -> float:
        short = lane.ahead_of(priority) + 1 - self._room()
        if short <= 0:
            return 0.0
        wait_ms = short * self._service_ms(now_ms) / self.config.in_flight_max
        if wait_ms <= self._closes_in_ms(now_ms):
            return wait_ms
        return wait_ms + self._turns_ms(lane, now_ms) + self.swap_ms(lane, now_ms)

    def _target_lead_ms(self, lane: Lane, now_ms: float) -> float:
        swap_ms = self.swap_ms(lane, now_ms)
        if self.slot.phase is SlotPhase.SWAPPING:
            return max(0.0, swap_ms - (now_ms - self.slot.swap_began_ms))
        return self._drain_left_ms(now_ms) + swap_ms

    def _lead_ms(self, lane: Lane, now_ms: float) -> float:
        """Until the slot has finished what it is committed to."""
        slot = self.slot
        if slot.phase is SlotPhase.SERVING:
            return self._until_closed_ms(lane, now_ms)
        if slot.target is None:
            return self._drain_left_ms(now_ms) if slot.phase is SlotPhase.DRAINING else 0.0
        target = self.lanes[slot.target]
        return self._target_lead_ms(target, now_ms) + self._stay_ms(target, now_ms)

    def _until_closed_ms(self, lane: Lane, now_ms: float) -> float:
        """Until the resident has let go: out of work, or closed by its rules and drained."""
        assert self.slot.resident is not None
        running = len(self.slot.running)
        work = running + len(self.lanes[self.slot.resident])
        if work == 0:
            return 0.0
        aged_ms = min(lane.head_ms, now_ms) + self.config.age_bound_ms
        closed_ms = max(self.slot.stays_until_ms, aged_ms) - now_ms
        drain_ms = self._drain_ms(now_ms) if running else 0.0
        return min(self._batches_ms(work, now_ms) + drain_ms, max(0.0, closed_ms) + drain_ms)

    def _closes_in_ms(self, now_ms: float) -> float:
        oldest_ms = min(
            (lane.head_ms for lane in self.waiting.values() if lane.expert != self.slot.resident),
            default=math.inf,
        )
        closes_ms = max(self.slot.stays_until_ms, oldest_ms + self.config.age_bound_ms)
        return max(0.0, closes_ms - now_ms)

    def _turns_ms(self, own: Lane, now_ms: float) -> float:
        """The turns of other experts whose oldest request is older than ours."""
        resident, target = self._lane_of(self.slot.resident), self._lane_of(self.slot.target)
        service_ms, batch = self._service_ms(now_ms), self.config.in_flight_max
        factor, guess_ms = self.config.min_residency_factor, self.any_swap.value or 0.0
        least_ms = self.config.min_residency_ms + service_ms
        base_ms = factor * service_ms + service_ms
        head_ms, total_ms = own.head_ms, 0.0
        # One plain loop: it runs over every waiting expert at every arrival.
        for lane in self.waiting.values():
            if lane.head_ms > head_ms or lane is own or lane is resident or lane is target:
                continue
            swap_ms = lane.swap.value
            if swap_ms is None:
                swap_ms = guess_ms
            stay_ms = factor * swap_ms + base_ms
            if stay_ms < least_ms:
                stay_ms = least_ms
            work_ms = -(-lane.count // batch) * service_ms
            total_ms += swap_ms + (work_ms if work_ms < stay_ms else stay_ms)
        return total_ms

    def _lane_of(self, expert: str | None) -> Lane | None:
        return None if expert is None else self.lanes[expert]

    def _stay_ms(self, lane: Lane, now_ms: float) -> float:
        """How long a turn of this expert lasts once it is resident."""
        if not len(lane):
            return 0.0
        bound_ms = self.config.residency_ms(self.swap_ms(lane, now_ms) + self._service_ms(now_ms))
        return min(self._batches_ms(len(lane), now_ms), bound_ms) + self._drain_ms(now_ms)

    def _drain_left_ms(self, now_ms: float) -> float:
        if not self.slot.running:
            return 0.0
        return max(0.0, self._drain_ms(now_ms) - (now_ms - self.slot.drain_began_ms))

    def _drain_ms(self, now_ms: float) -> float:
        """What runs has to end first; by its mean, and no longer than was allowed for."""
        return min(self._service_ms(now_ms), self.drain_ms_max)

    def _batches_ms(self, requests: int, now_ms: float) -> float:
        return (requests // self.config.in_flight_max) * self._service_ms(now_ms)

    def _room(self) -> int:
        return self.config.in_flight_max - len(self.slot.running)

    def swap_ms(self, lane: Lane, now_ms: float) -> float:
        """What a swap to this expert takes, by what was measured for it or for its siblings."""
        known = lane.swap.fresh(now_ms)
        return known if known is not None else self.any_swap.fresh(now_ms) or 0.0

    def _service_ms(self, now_ms: float) -> float:
        return self.service.fresh(now_ms) or 0.0
