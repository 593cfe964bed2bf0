"""When the wait of each queued request ends. Pure; it reads the slot and changes nothing there.

A request may name a longest wait, and the configuration may set one for all. Without a number the
wait is bounded by age bound, drain deadline and one swap: the swap to the request's own expert has
to begin within the first two. From then on it is waited for, because nobody is served sooner by
giving up in the middle of it, but not longer than any swap may take; whoever it brings no room for
is refused when it ends.

A drain that began for an expert in time is waited for to its deadline, and then as long as nothing
is left but aborted requests that are just stopping. An answer that has begun is never cut; so where
one outlasts the deadline, the wait ends there.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping

from deployments.swap.config import SchedulerConfig
from deployments.swap.lanes import Request
from deployments.swap.slot import Slot
from deployments.swap.states import SlotPhase

__all__ = ["LATE_MS", "Patience"]

LATE_MS = 50.0
"""How late a timer may be: a drain that begins by so much after the instant that called for it is
waited for to its deadline all the same."""

_STOPPING_MS_MAX = 1_000.0  # aborted requests take a moment to leave the device
_SLACK = 64


class Patience:
    """``queued``: who waits, by id; its owner adds and removes. Who has left is forgotten here."""

    def __init__(self, config: SchedulerConfig, slot: Slot, queued: Mapping[str, Request]) -> None:
        self._config = config
        self._slot = slot
        self._queued = queued
        self._due: list[tuple[float, int, str]] = []  # heap; entries of the departed linger
        self._in_turn: list[Request] = []  # past their time, while the slot turns to their expert

    def watch(self, request: Request) -> None:
        """The request waits, from now on."""
        self._look_again(request, min(request.expires_ms, request.turn_by_ms))

    def over(self, now_ms: float) -> list[Request]:
        """Whose wait is over. Whoever asks must take them out of ``queued``."""
        if self._in_turn and self._slot.phase in (SlotPhase.SERVING, SlotPhase.EMPTY):
            self._turn_has_ended()
        over: list[Request] = []
        while self._due and (not self._is_live(self._due[0]) or self._due[0][0] <= now_ms):
            entry = heapq.heappop(self._due)
            if not self._is_live(entry):
                continue
            request = self._queued[entry[2]]
            ends_ms = self._ends_ms(request, now_ms)
            if ends_ms <= now_ms:
                request.due_ms = math.nan  # no other entry is about it any more
                over.append(request)
            else:
                self._in_turn.append(request)
                self._look_again(request, ends_ms)
        self._forget_departed()
        return over

    def next_ms(self) -> float:
        """When to look next; infinite when nobody waits."""
        return self._due[0][0] if self._queued and self._due else math.inf

    def _ends_ms(self, request: Request, now_ms: float) -> float:
        """The end of the wait as things stand; later than it was once its expert's turn begins."""
        slot = self._slot
        turn_by_ms = request.turn_by_ms
        if slot.target == request.expert and slot.phase is SlotPhase.SWAPPING:
            # Stopped by then, its end says more than a refusal; one that hangs says nothing.
            limit_ms = self._config.swap_timeout_ms + self._config.close_grace_ms
            turn_by_ms = slot.swap_began_ms + limit_ms
        elif slot.target == request.expert and slot.phase is SlotPhase.DRAINING:
            turn_by_ms = max(turn_by_ms, self._drained_by_ms(turn_by_ms, now_ms))
        return min(request.expires_ms, turn_by_ms)

    def _drained_by_ms(self, turn_by_ms: float, now_ms: float) -> float:
        """Until when a drain that began in time for this turn is waited for; else long past."""
        slot = self._slot
        ends_ms = slot.drain_began_ms + self._config.drain_deadline_ms
        if ends_ms > turn_by_ms + LATE_MS:
            return -math.inf
        stopping = now_ms >= ends_ms and not slot.held_up
        return ends_ms + (_STOPPING_MS_MAX if stopping else 0.0)

    def _turn_has_ended(self) -> None:
        for request in self._in_turn:
            if self._queued.get(request.id) is request:
                self.watch(request)
        self._in_turn.clear()

    def _look_again(self, request: Request, at_ms: float) -> None:
        request.due_ms = at_ms
        if at_ms < math.inf:
            heapq.heappush(self._due, (at_ms, request.seq, request.id))

    def _is_live(self, entry: tuple[float, int, str]) -> bool:
        request = self._queued.get(entry[2])
        return request is not None and (request.due_ms, request.seq) == entry[:2]

    def _forget_departed(self) -> None:
        if len(self._due) > 2 * len(self._queued) + _SLACK:
            self._due = [entry for entry in self._due if self._is_live(entry)]
            heapq.heapify(self._due)
