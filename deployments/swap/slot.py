"""The slot itself: its phase, who is in it and what it runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from deployments.swap.lanes import Request
from deployments.swap.states import SlotEvent, SlotPhase, transition

__all__ = ["Slot"]


@dataclass(slots=True)
class Slot:
    """One engine's place. Every change of phase goes through the table of ``states``.

    ``stays_until_ms``: end of the resident's minimum residency. ``evict``: the resident was taken
    out of service, so the slot must not go back to it without a fresh swap. ``turn_owed``: a drain
    took so long that somebody whom it was for has been refused.
    """

    phase: SlotPhase = SlotPhase.EMPTY
    resident: str | None = None
    target: str | None = None
    running: dict[str, Request] = field(default_factory=dict)
    stays_until_ms: float = -math.inf
    drain_began_ms: float = math.nan
    drain_aborted: bool = False
    turn_owed: bool = False
    swap_began_ms: float = math.nan
    evict: bool = False

    def begin_drain(self, target: str | None, now_ms: float) -> None:
        self.phase = transition(self.phase, SlotEvent.BEGIN_DRAIN)
        self.target = target
        self.drain_began_ms = now_ms
        self.drain_aborted = False
        self.turn_owed = False

    def resume(self) -> None:
        self.phase = transition(self.phase, SlotEvent.RESUME)
        self.target = None

    def begin_swap(self, target: str, now_ms: float) -> None:
        """From here on the engine holds nobody's weights until the swap is done."""
        self.phase = transition(self.phase, SlotEvent.BEGIN_SWAP)
        self._clear(target)
        self.swap_began_ms = now_ms

    def swap_done(self, stays_until_ms: float) -> None:
        self.phase = transition(self.phase, SlotEvent.SWAP_DONE)
        self.resident, self.target = self.target, None
        self.stays_until_ms = stays_until_ms

    def swap_failed(self) -> None:
        self.phase = transition(self.phase, SlotEvent.SWAP_FAILED)
        self._clear(None)

    def vacate(self) -> None:
        self.phase = transition(self.phase, SlotEvent.VACATE)
        self._clear(None)

    @property
    def held_up(self) -> bool:
        """Whether something runs that no drain may abort: it has sent, or was aborted before."""
        return any(
            not request.aborting and (request.sent or request.aborts > 0)
            for request in self.running.values()
        )

    def _clear(self, target: str | None) -> None:
        self.resident, self.target, self.evict = None, target, False
