"""Schedulers with a known mistake each. A simulation that lets one of them pass checks nothing."""

from __future__ import annotations

import math
from typing import Any

from deployments.swap.config import SchedulerConfig
from deployments.swap.core import Scheduler
from deployments.swap.effects import BeginSwap, Effect, Grant
from deployments.swap.lanes import Lane, Request
from deployments.swap.patience import Patience
from deployments.swap.states import SlotPhase


class NoFairness(Scheduler):
    """The usual order: the resident first, a swap only when it is idle."""

    def _next_target(self) -> str | None:
        return super()._next_target() if self._is_idle() else None

    def _closing_ms(self) -> float:
        return math.inf


class GrantsWhileSwapping(Scheduler):
    """Lets requests through as soon as their swap has begun."""

    def _begin_swap(self, target: str) -> None:
        super()._begin_swap(target)
        self._effects.extend(Grant(request.id) for request in self._lanes[target].requests())


class LeaksOnCancel(Scheduler):
    """Forgets that a client may leave while its request runs."""

    def cancel(self, request_id: str, now_ms: float) -> list[Effect]:
        if request_id in self.in_flight_ids:
            return self.tick(now_ms)
        return super().cancel(request_id, now_ms)


class GrantsTwice(Scheduler):
    """Grants a request again when the one before it in the batch ends."""

    def finish(self, request_id: str, now_ms: float) -> list[Effect]:
        effects = super().finish(request_id, now_ms)
        return [*effects, *(Grant(name) for name in sorted(self.in_flight_ids)[:1])]


class SwapsForTheDeparted(Scheduler):
    """Keeps to a drain's target after everybody who wanted it has left."""

    def _advance_drain(self) -> None:
        target = self._slot.target
        if target is not None and not self._slot.running:
            self._begin_swap(target)
        elif target is None or target in self._waiting:
            super()._advance_drain()
        else:
            self._slot.drain_aborted = True


class ForgetsTheDrainDeadline(Scheduler):
    """Aborts at once what has sent nothing."""

    def _drain_ends_ms(self) -> float:
        return self._slot.drain_began_ms


class CutsStartedAnswers(Scheduler):
    """Does not care whether an answer has begun."""

    def first_token(self, request_id: str) -> bool:
        return True


class SwapsUnderRunningRequests(Scheduler):
    """Does not wait for the drain."""

    def _advance_drain(self) -> None:
        if self._slot.target is not None:
            self._effects.append(BeginSwap(self._slot.target))
        super()._advance_drain()


class NeverAsksToWake(Scheduler):
    """Relies on the next arrival to notice that time has passed."""

    def _ask_for_wake(self) -> None:
        return None


class KeepsAnUnboundedQueue(Scheduler):
    """Takes everybody."""

    def _refuse_on_arrival(self, request: object, lane: Lane) -> bool:
        return False


class ServesTheRetired(Scheduler):
    """Lets a retired resident go on granting."""

    def _reconsider_resident(self) -> None:
        self._slot.evict = False
        lane = self._lanes[self._slot.resident or ""]
        lane.out_of_service = None
        super()._reconsider_resident()


class TurnsToTheLongestQueue(Scheduler):
    """Notices that somebody has aged, and turns to somebody else."""

    def _oldest_aged(self) -> str | None:
        return super()._oldest_aged() and self._heaviest(least=-math.inf)[0]


class ForgetsPatience(Scheduler):
    """Lets wait who has waited as long as it may."""

    def _new_request(
        self, request_id: str, expert: str, priority: int, deadline_ms: float | None
    ) -> Request:
        request = super()._new_request(request_id, expert, priority, deadline_ms)
        request.expires_ms += request.limit_ms + 1_000.0
        return request


class ForgetsTheBound(Scheduler):
    """Takes no number for no bound."""

    def _new_request(
        self, request_id: str, expert: str, priority: int, deadline_ms: float | None
    ) -> Request:
        request = super()._new_request(request_id, expert, priority, deadline_ms)
        request.turn_by_ms = math.inf
        return request


class _OtherPatience(Scheduler):
    patience: type[Patience]

    def __init__(self, config: SchedulerConfig, *others: Any) -> None:
        super().__init__(config, *others)
        self._patience = self.patience(config, self._slot, self._queued)


class _AnySwap(Patience):
    def _ends_ms(self, request: Request, now_ms: float) -> float:
        if self._slot.phase is SlotPhase.SWAPPING:
            return request.expires_ms
        return super()._ends_ms(request, now_ms)


class WaitsForAnySwap(_OtherPatience):
    """Counts somebody else's swap as the one that a request waits for."""

    patience = _AnySwap


class _NoReturn(Patience):
    def _turn_has_ended(self) -> None:
        self._in_turn.clear()


class LeavesWhoFoundNoRoom(_OtherPatience):
    """Lets those wait on whom a swap that they waited for had no room for."""

    patience = _NoReturn


class _GivesUp(Patience):
    def _ends_ms(self, request: Request, now_ms: float) -> float:
        return min(request.expires_ms, request.turn_by_ms)


class GivesUpInTheSwap(_OtherPatience):
    """Refuses those whose own swap is under way."""

    patience = _GivesUp


class _ImpatientDrain(Patience):
    def _drained_by_ms(self, turn_by_ms: float, now_ms: float) -> float:
        return -math.inf


class GivesUpInTheDrain(_OtherPatience):
    """Refuses at the very instant at which a drain that was begun in time is over."""

    patience = _ImpatientDrain


class GivesPatienceAnew(Scheduler):
    """Lets a request that was taken back wait once more as long as it may."""

    def requeue(self, request_id: str, now_ms: float) -> list[Effect]:
        request = self._slot.running[request_id]
        effects = super().requeue(request_id, now_ms)
        request.expires_ms = now_ms + request.limit_ms
        return effects


class DrainsForEver(Scheduler):
    """Never aborts."""

    def _drain_ends_ms(self) -> float:
        return math.inf


class TrustsAFailedSwap(Scheduler):
    """Serves from a slot whose swap has failed."""

    def swap_failed(self, expert: str, reason: str, now_ms: float) -> list[Effect]:
        assert self.phase is SlotPhase.SWAPPING
        return self.swap_done(expert, now_ms, 0.0)


PLANTED: dict[type[Scheduler], str] = {
    NoFairness: "starved",
    GrantsWhileSwapping: "granted during a swap",
    LeaksOnCancel: "in-flight sets differ",
    GrantsTwice: "granted while Status.RUNNING",
    SwapsForTheDeparted: "for which nobody waits",
    ForgetsTheDrainDeadline: "aborted before the deadline",
    CutsStartedAnswers: "cut after its first token",
    SwapsUnderRunningRequests: "under running requests",
    NeverAsksToWake: "no wake-up is asked for",
    KeepsAnUnboundedQueue: "over its bound",
    ServesTheRetired: "granted to a retired expert",
    TurnsToTheLongestQueue: "starved: it is older",
    ForgetsPatience: "beyond what it allowed",
    ForgetsTheBound: "beyond age bound, drain deadline and one swap",
    WaitsForAnySwap: "beyond age bound, drain deadline and one swap",
    LeavesWhoFoundNoRoom: "beyond age bound, drain deadline and one swap",
    GivesUpInTheSwap: "refused in its own swap",
    GivesUpInTheDrain: "refused before its turn",
    GivesPatienceAnew: "beyond what it allowed",
    DrainsForEver: "holds up a drain",
    TrustsAFailedSwap: "granted to a retired expert|residents differ|granted while None",
}
"""Each mistake and the rule (a regular expression) that has to catch it."""
