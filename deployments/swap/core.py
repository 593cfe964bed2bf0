"""The swap scheduler: which request runs now, and which expert the slot turns to next.

Pure: events with their time go in, effects come out. Nothing here waits, reads a clock, draws a
random number or touches an engine, so every decision can be replayed. One caller owns an instance
and carries out the effects in order; ``driver`` is that caller in production and the simulation
under ``tests/sim`` is another.

Rules, in the order in which they bind (``design.md`` argues for each):

1. A request runs only while its expert is resident and the slot is serving.
2. A resident that is out of work gives way at once to whoever waits.
3. A resident with work keeps the slot for its minimum residency.
4. After that, a request of another expert that has waited the age bound closes admission; the
   oldest such request names the target.
5. Otherwise the slot turns when the waiting work elsewhere outweighs the resident's waiting work
   and what it would take on during drain and swap.
6. A drain waits for what runs. Past its deadline it aborts requests that have sent nothing, each at
   most once; it never cuts a started answer.
7. After a swap the newcomer's batch is granted before anything else is weighed, so every swap
   serves somebody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from deployments.swap.config import SchedulerConfig
from deployments.swap.costs import EngineCosts
from deployments.swap.effects import (
    AbortInFlight,
    BeginSwap,
    Effect,
    Grant,
    Refusal,
    Refuse,
    SlotSnapshot,
    WakeAt,
)
from deployments.swap.forecast import Forecast
from deployments.swap.lanes import PRIORITY_MAX, Lane, Request
from deployments.swap.measures import Measured
from deployments.swap.patience import Patience
from deployments.swap.slot import Slot
from deployments.swap.states import SlotPhase

__all__ = ["Scheduler", "SchedulerConfig"]

# Rounding may make a wake-up a hair early; it must not be asked for again at the same instant.
_RECONSIDER_MS_MIN = 1.0


class Scheduler:
    """Decides for one slot. Every method that takes an event returns the effects it causes.

    ``experts``: all that this slot can hold; an id outside them raises ``KeyError``. ``resident``:
    whose weights are in the engine already, if anybody's. ``engines``: the engine that each expert
    runs in, where engines share the slot by sleeping in turn; a swap to another engine has a cost
    of its own. Events must come in time order; one that is late is taken to happen at the latest
    time seen.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        experts: Sequence[str],
        resident: str | None = None,
        engines: Mapping[str, str] | None = None,
    ) -> None:
        self._config = config
        self._lanes = {expert: Lane(expert, self._measured()) for expert in experts}
        self._costs = EngineCosts(self._lanes, engines or {}, self._measured)
        if resident is not None and resident not in self._lanes:
            raise KeyError(resident)
        if resident is not None:
            self._costs.awake(resident)
        phase = SlotPhase.EMPTY if resident is None else SlotPhase.SERVING
        self._slot = Slot(phase=phase, resident=resident)
        self._queued: dict[str, Request] = {}
        self._waiting: dict[str, Lane] = {}  # lanes that are not empty
        self._patience = Patience(config, self._slot, self._queued)
        self._any_swap = self._measured()
        self._service = self._measured()
        self._forecast = Forecast(
            config, self._slot, self._lanes, self._waiting, self._any_swap, self._service
        )
        # Nobody is refused beforehand because answers might outlast the drain deadline.
        self._allowed = replace(self._forecast, drain_ms_max=config.drain_deadline_ms)
        self._effects: list[Effect] = []
        self._wake_ms: float | None = None
        self._now_ms = -math.inf
        self._seq = 0
        self._service_changes = 0  # how often an expert left or re-entered service

    # --- events ----------------------------------------------------------------------------------

    def arrive(
        self,
        request_id: str,
        expert: str,
        *,
        now_ms: float,
        priority: int = 0,
        deadline_ms: float | None = None,
    ) -> list[Effect]:
        """A request comes. ``deadline_ms``: the longest wait for its grant, counted from now.

        It is refused at once when its expert is out of service, when the queue is at its bound, or
        when the measured wait exceeds what it or the configuration allows.
        """
        self._advance(now_ms)
        if request_id in self._queued or request_id in self._slot.running:
            raise ValueError(f"request {request_id!r} is here already")
        lane = self._lanes[expert]
        lane.use_hint()
        request = self._new_request(request_id, expert, priority, deadline_ms)
        if not self._refuse_on_arrival(request, lane):
            self._enqueue(request)
        return self._settle()

    def cancel(self, request_id: str, now_ms: float) -> list[Effect]:
        """The caller is gone, or its request failed. Harmless when the request has ended already.

        A granted request must no longer run on the device when this is called.
        """
        self._advance(now_ms)
        request = self._queued.get(request_id)
        if request is not None:
            self._dequeue(request)
        else:
            self._slot.running.pop(request_id, None)
        return self._settle()

    def first_token(self, request_id: str) -> bool:
        """The request is about to send its first token: from here on no drain aborts it.

        False when a drain has aborted it already; then nothing may be sent.
        """
        request = self._slot.running[request_id]
        request.sent = not request.aborting
        return request.sent

    def finish(self, request_id: str, now_ms: float) -> list[Effect]:
        """A granted request has run to its end."""
        self._advance(now_ms)
        request = self._slot.running.pop(request_id)
        self._service.observe(self._now_ms - request.granted_ms, self._now_ms)
        return self._settle()

    def requeue(self, request_id: str, now_ms: float) -> list[Effect]:
        """A granted request that has sent nothing goes back, with its seniority, to wait again.

        It counts against no bound: it was accepted before, and at most ``in_flight_max`` can do so.
        """
        self._advance(now_ms)
        request = self._slot.running[request_id]
        if request.sent:
            raise ValueError(f"request {request_id!r} has sent tokens; it cannot start again")
        del self._slot.running[request_id]
        request.aborting = False
        request.wait_again(self._now_ms, self._config.turn_wait_ms_max)
        lane = self._lanes[request.expert]
        if lane.out_of_service is None:
            self._enqueue(request, back=True)
        else:
            self._refuse(request, Refusal.OUT_OF_SERVICE, math.inf)
        return self._settle()

    def swap_done(self, expert: str, now_ms: float, swap_ms: float) -> list[Effect]:
        """The expert asked for by ``BeginSwap`` is resident; ``swap_ms`` is what it took."""
        self._advance(now_ms)
        lane = self._swapped_lane(expert)
        lane.swap.observe(swap_ms, self._now_ms)
        if self._costs.in_place(expert):
            self._any_swap.observe(swap_ms, self._now_ms)
        # A turn costs its swap and the drain that ends it, which lasts about one service time.
        turn_ms = (lane.swap.value or 0.0) + (self._service.value or 0.0)
        self._costs.awake(expert)
        stays_ms = self._config.residency_ms(turn_ms)
        self._slot.swap_done(self._now_ms + stays_ms)
        if lane.out_of_service is None:
            self._grant_batch()  # rule 7
        else:
            self._slot.vacate()
        return self._settle()

    def swap_failed(self, expert: str, reason: str, now_ms: float) -> list[Effect]:
        """The weights could not be made resident, or answer wrongly: the expert is out of service
        and the slot holds nobody.
        """
        self._advance(now_ms)
        lane = self._swapped_lane(expert)
        self._slot.swap_failed()
        self._take_out(lane, reason)
        return self._settle()

    def tick(self, now_ms: float) -> list[Effect]:
        """Time has passed; answers ``WakeAt``."""
        self._advance(now_ms)
        self._wake_ms = None  # the timer has fired: always ask anew
        return self._settle()

    def announce(self, expert: str, now_ms: float) -> list[Effect]:
        """A request for this expert is likely soon. Adds weight to its lane for a while; alone it
        never causes a swap.
        """
        self._advance(now_ms)
        self._lanes[expert].add_hint(self._now_ms + self._config.announce_ttl_ms)
        return self._settle()

    def retire(self, expert: str, reason: str, now_ms: float) -> list[Effect]:
        """Take an expert out of service. Its waiters are refused; what it runs may finish, then the
        slot forgets it, so that it comes back only by a fresh swap.
        """
        self._advance(now_ms)
        self._take_out(self._lanes[expert], reason)
        if self._slot.resident == expert:
            self._slot.evict = True
        return self._settle()

    def restore(self, expert: str, now_ms: float) -> list[Effect]:
        """Put an expert back into service."""
        self._advance(now_ms)
        self._lanes[expert].out_of_service = None
        self._service_changes += 1
        return self._settle()

    # --- questions -------------------------------------------------------------------------------

    def expected_wait_ms(self, expert: str, now_ms: float, priority: int = 0) -> float:
        """How long a request that came now would wait; infinite when out of service."""
        return self._forecast.wait_ms(expert, _clamped(priority), max(now_ms, self._now_ms))

    def snapshot(self) -> SlotSnapshot:
        slot, lanes = self._slot, self._lanes.values()
        return SlotSnapshot(
            phase=slot.phase,
            resident=slot.resident,
            target=slot.target,
            queued={lane.expert: len(lane) for lane in self._waiting.values()},
            in_flight=len(slot.running),
            in_flight_max=self._config.in_flight_max,
            swap_ms={lane.expert: ms for lane in lanes if (ms := lane.swap.value) is not None},
            service_ms=self._service.value,
            out_of_service={lane.expert: why for lane in lanes if (why := lane.out_of_service)},
        )

    def visible_state(self) -> tuple[object, ...]:
        """What a registry must hear of at once when it changes: phase, resident, target, service.

        Comparable, and cheap enough to compare after every event.
        """
        return (self._slot.phase, self._slot.resident, self._slot.target, self._service_changes)

    def wanted(self) -> list[str]:
        """Experts with work waiting or announced, the greatest demand first."""
        bound_ms = self._config.age_bound_ms
        demand = {
            lane.expert: lane.demand(self._now_ms, bound_ms) + self._hinted(lane)
            for lane in self._lanes.values()
            if lane.out_of_service is None and (lane.count or lane.hints(self._now_ms))
        }
        return sorted(demand, key=demand.__getitem__, reverse=True)

    def has_sent(self, request_id: str) -> bool:
        """Whether a granted request has begun to send."""
        return self._slot.running[request_id].sent

    @property
    def phase(self) -> SlotPhase:
        return self._slot.phase

    @property
    def resident(self) -> str | None:
        return self._slot.resident

    @property
    def queued_ids(self) -> frozenset[str]:
        return frozenset(self._queued)

    @property
    def in_flight_ids(self) -> frozenset[str]:
        return frozenset(self._slot.running)

    # --- settling: after every event, until nothing more follows from it ------------------------

    def _settle(self) -> list[Effect]:
        self._expire()
        before = None
        while self._slot.phase is not before:  # a drain may end, and a swap begin, in one step
            before = self._slot.phase
            self._move()
        self._grant_batch()
        self._ask_for_wake()
        effects, self._effects = self._effects, []
        return effects

    def _move(self) -> None:
        if self._slot.phase is SlotPhase.SERVING:
            self._reconsider_resident()
        elif self._slot.phase is SlotPhase.DRAINING:
            self._advance_drain()
        elif self._slot.phase is SlotPhase.EMPTY:
            target = self._next_target()
            if target is not None:
                self._begin_swap(target)

    def _reconsider_resident(self) -> None:
        target = None if self._slot.evict else self._next_target()
        if self._slot.evict or (target is not None and self._slot.running):
            self._slot.begin_drain(target, self._now_ms)
        elif target is not None:
            self._begin_swap(target)

    def _advance_drain(self) -> None:
        slot = self._slot
        owed = slot.turn_owed and slot.running
        if slot.target not in self._waiting and not owed:  # all have left: no swap for nobody
            slot.target = self._next_target()
        if slot.target is None and not slot.evict:
            slot.resume()
        elif not slot.running:
            if slot.target is None:
                slot.vacate()
            else:
                self._begin_swap(slot.target)
        elif not slot.drain_aborted and self._drain_ends_ms() <= self._now_ms:
            self._abort_unsent()

    def _begin_swap(self, target: str) -> None:
        self._slot.begin_swap(target, self._now_ms)
        self._effects.append(BeginSwap(target))

    def _abort_unsent(self) -> None:
        self._slot.drain_aborted = True
        unsent = [r for r in self._slot.running.values() if not r.sent and r.aborts == 0]
        for request in unsent:
            request.aborting = True
            request.aborts += 1
        if unsent:
            self._effects.append(AbortInFlight(tuple(request.id for request in unsent)))

    def _grant_batch(self) -> None:
        slot = self._slot
        if slot.phase is not SlotPhase.SERVING:
            return
        lane = self._waiting.get(slot.resident or "")
        while lane and len(slot.running) < self._config.in_flight_max:
            request = lane.first(self._now_ms, self._config.age_bound_ms)
            self._dequeue(request)
            request.granted_ms = self._now_ms
            slot.running[request.id] = request
            self._effects.append(Grant(request.id))

    # --- whose turn is next ----------------------------------------------------------------------

    def _next_target(self) -> str | None:
        """The expert that the slot should turn to now; None: stay."""
        if not self._waiting:
            return None
        if self._is_idle():
            return self._oldest_aged() or self._heaviest(least=0.0)[0]
        if self._now_ms < self._slot.stays_until_ms and not self._slot.evict:
            return None
        return self._oldest_aged() or self._heaviest(least=self._resident_demand())[0]

    def _is_idle(self) -> bool:
        return not self._slot.running and self._slot.resident not in self._waiting

    def _oldest_aged(self) -> str | None:
        """Whose oldest request, among other experts', has reached the age bound first."""
        oldest, oldest_ms = None, math.inf
        for lane in self._waiting.values():
            if lane.head_ms < oldest_ms and lane.expert != self._slot.resident:
                oldest, oldest_ms = lane.expert, lane.head_ms
        return oldest if oldest_ms + self._config.age_bound_ms <= self._now_ms else None

    def _heaviest(self, least: float) -> tuple[str | None, float]:
        """The expert whose demand most exceeds ``least`` and its own swap's displacement, if any
        does; and when, if nobody comes or goes, the first will.
        """
        now_ms, bound_ms, resident = self._now_ms, self._config.age_bound_ms, self._slot.resident
        growth = self._resident_growth()
        best, best_margin, crossing_ms = None, 0.0, math.inf
        for lane in self._waiting.values():
            if lane.expert == resident:
                continue
            margin = lane.demand(now_ms, bound_ms) - least
            margin += self._hinted(lane) - self._displaced_by(lane)
            if margin > best_margin:
                best, best_margin = lane.expert, margin
            elif margin <= 0.0 and lane.demand_per_ms(bound_ms) > growth:
                crossing_ms = min(
                    crossing_ms, now_ms - margin / (lane.demand_per_ms(bound_ms) - growth)
                )
        return best, crossing_ms

    def _resident_demand(self) -> float:
        lane = self._resident_lane()
        if lane is None:
            return 0.0
        return lane.demand(self._now_ms, self._config.age_bound_ms) + self._hinted(lane)

    def _resident_growth(self) -> float:
        lane = self._resident_lane()
        return lane.demand_per_ms(self._config.age_bound_ms) if lane else 0.0

    def _hinted(self, lane: Lane) -> float:
        return self._config.announce_weight * lane.hints(self._now_ms)

    def _displaced_by(self, lane: Lane) -> float:
        """Requests that the resident would take on while it drains and the swap runs.

        Little's law: it takes on in_flight / service per ms. Draining lasts about one service time,
        so each request in flight stands for one displaced; the swap displaces in proportion.
        """
        swap_ms = lane.swap.value
        if swap_ms is None:
            swap_ms = self._any_swap.value or 0.0
        services = swap_ms / self._service.value if self._service.value else 0.0
        return len(self._slot.running) * (1.0 + services)

    def _resident_lane(self) -> Lane | None:
        resident = self._slot.resident
        return None if resident is None or self._slot.evict else self._lanes[resident]

    # --- requests --------------------------------------------------------------------------------

    def _new_request(
        self, request_id: str, expert: str, priority: int, deadline_ms: float | None
    ) -> Request:
        self._seq += 1
        named_ms = self._config.queue_wait_ms_max
        limit_ms = math.inf if named_ms is None else named_ms
        if deadline_ms is not None:
            limit_ms = min(limit_ms, max(0.0, deadline_ms))
        turn_ms = self._config.turn_wait_ms_max
        with_swap_ms = turn_ms + self._forecast.swap_ms(self._lanes[expert], self._now_ms)
        return Request(
            id=request_id,
            expert=expert,
            priority=_clamped(priority),
            seq=self._seq,
            arrived_ms=self._now_ms,
            expires_ms=self._now_ms + limit_ms,
            turn_by_ms=self._now_ms + turn_ms,
            limit_ms=min(limit_ms, with_swap_ms),
        )

    def _refuse_on_arrival(self, request: Request, lane: Lane) -> bool:
        if lane.out_of_service is None and self._runs_at_once(lane):
            return False
        wait_ms = self._forecast.wait_ms(lane.expert, request.priority, self._now_ms)
        if lane.out_of_service is not None:
            self._refuse(request, Refusal.OUT_OF_SERVICE, wait_ms)
        elif len(self._queued) >= self._config.queue_max:
            self._refuse(request, Refusal.QUEUE_FULL, wait_ms)
        elif self._waits_too_long(request, wait_ms):
            self._refuse(request, Refusal.DEADLINE, wait_ms, wait_ms)
        else:
            return False
        return True

    def _waits_too_long(self, request: Request, wait_ms: float) -> bool:
        if self._now_ms + wait_ms > request.expires_ms:
            return True
        if wait_ms <= request.limit_ms:
            return False
        wait_ms = self._allowed.wait_ms(request.expert, request.priority, self._now_ms)
        return wait_ms > request.limit_ms

    def _runs_at_once(self, lane: Lane) -> bool:
        slot = self._slot
        serving = slot.phase is SlotPhase.SERVING and slot.resident == lane.expert
        return serving and not lane and len(slot.running) < self._config.in_flight_max

    def _enqueue(self, request: Request, *, back: bool = False) -> None:
        lane = self._lanes[request.expert]
        self._queued[request.id] = request
        self._waiting[request.expert] = lane
        (lane.push_back if back else lane.push)(request)
        self._patience.watch(request)

    def _dequeue(self, request: Request) -> None:
        lane = self._lanes[request.expert]
        del self._queued[request.id]
        lane.remove(request)
        if not lane:
            del self._waiting[request.expert]

    def _refuse(
        self, request: Request, reason: Refusal, wait_ms: float, ahead_ms: float | None = None
    ) -> None:
        """``ahead_ms``: what it would still have to wait."""
        self._effects.append(
            Refuse(
                request_id=request.id,
                expert=request.expert,
                reason=reason,
                wait_ms=wait_ms,
                limit_ms=request.limit_ms,
                depth=len(self._queued),
                detail=self._lanes[request.expert].out_of_service or "",
                retry_ms=None if ahead_ms is None else max(0.0, ahead_ms - request.limit_ms),
            )
        )

    def _take_out(self, lane: Lane, reason: str) -> None:
        lane.out_of_service = reason or "no reason given"
        self._service_changes += 1
        for request in lane.requests():
            self._dequeue(request)
            self._refuse(request, Refusal.OUT_OF_SERVICE, math.inf)

    def _swapped_lane(self, expert: str) -> Lane:
        if self._slot.phase is not SlotPhase.SWAPPING or self._slot.target != expert:
            raise ValueError(f"no swap to {expert!r} is running")
        return self._lanes[expert]

    # --- time ------------------------------------------------------------------------------------

    def _measured(self) -> Measured:
        return Measured(self._config.measure_weight, self._config.measure_ttl_ms)

    def _advance(self, now_ms: float) -> None:
        self._now_ms = max(self._now_ms, now_ms)

    def _expire(self) -> None:
        """Refuse everybody whose patience is over."""
        for request in self._patience.over(self._now_ms):
            self._expire_one(request)

    def _expire_one(self, request: Request) -> None:
        self._dequeue(request)
        slot = self._slot
        drains_for_it = slot.phase is SlotPhase.DRAINING and slot.target == request.expert
        if drains_for_it and self._now_ms < request.expires_ms:
            slot.turn_owed = True  # it is told when to come back, and the drain has to get there
        waited_ms = self._now_ms - request.arrived_ms
        ahead_ms = self._forecast.wait_ms(request.expert, request.priority, self._now_ms)
        self._refuse(request, Refusal.DEADLINE, waited_ms + ahead_ms, ahead_ms)

    def _drain_ends_ms(self) -> float:
        return self._slot.drain_began_ms + self._config.drain_deadline_ms

    def _ask_for_wake(self) -> None:
        wake_ms = self._next_wake_ms()
        if wake_ms != self._wake_ms:
            self._wake_ms = wake_ms
            self._effects.append(WakeAt(wake_ms))

    def _next_wake_ms(self) -> float | None:
        wake_ms = min(self._patience.next_ms(), self._phase_wake_ms())
        return None if wake_ms == math.inf else wake_ms

    def _phase_wake_ms(self) -> float:
        slot = self._slot
        if slot.phase is SlotPhase.DRAINING and not slot.drain_aborted:
            return self._drain_ends_ms()
        others_wait = len(self._waiting) > (slot.resident in self._waiting)
        if slot.phase is not SlotPhase.SERVING or not others_wait:
            return math.inf
        if self._now_ms < slot.stays_until_ms:
            return slot.stays_until_ms
        return self._closing_ms()

    def _closing_ms(self) -> float:
        """When age or weight will next close admission to the resident, if nothing else happens."""
        heads = (
            lane.head_ms for lane in self._waiting.values() if lane.expert != self._slot.resident
        )
        aged_ms = min(heads) + self._config.age_bound_ms
        crossing_ms = self._heaviest(least=self._resident_demand())[1]
        return min(aged_ms, max(crossing_ms, self._now_ms + _RECONSIDER_MS_MIN))


def _clamped(priority: int) -> int:
    return max(-PRIORITY_MAX, min(PRIORITY_MAX, priority))
