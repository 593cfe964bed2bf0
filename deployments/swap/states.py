"""The slot's life as data: phases, events and the one table that joins them.

The table is repeated in ``design.md`` beside this file; a test keeps the two equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

__all__ = ["TRANSITIONS", "IllegalTransition", "SlotEvent", "SlotPhase", "transition"]


class SlotPhase(StrEnum):
    """What the slot is doing now."""

    EMPTY = "empty"  # no expert's weights can be trusted to be in the engine
    SERVING = "serving"  # the resident expert takes requests
    DRAINING = "draining"  # the resident finishes what it runs and takes nothing new
    SWAPPING = "swapping"  # another expert's weights are being copied in


class SlotEvent(StrEnum):
    """What can happen to the slot."""

    BEGIN_DRAIN = "begin_drain"
    RESUME = "resume"
    BEGIN_SWAP = "begin_swap"
    SWAP_DONE = "swap_done"
    SWAP_FAILED = "swap_failed"
    VACATE = "vacate"


class IllegalTransition(RuntimeError):
    """An event reached the slot in a phase in which it cannot happen: a bug, never load."""

    def __init__(self, phase: SlotPhase, event: SlotEvent) -> None:
        super().__init__(f"event {event.value!r} cannot happen while {phase.value!r}")
        self.phase = phase
        self.event = event


TRANSITIONS: Mapping[tuple[SlotPhase, SlotEvent], SlotPhase] = MappingProxyType(
    {
        (SlotPhase.EMPTY, SlotEvent.BEGIN_SWAP): SlotPhase.SWAPPING,
        (SlotPhase.SERVING, SlotEvent.BEGIN_DRAIN): SlotPhase.DRAINING,
        (SlotPhase.SERVING, SlotEvent.BEGIN_SWAP): SlotPhase.SWAPPING,
        (SlotPhase.SERVING, SlotEvent.VACATE): SlotPhase.EMPTY,
        (SlotPhase.DRAINING, SlotEvent.RESUME): SlotPhase.SERVING,
        (SlotPhase.DRAINING, SlotEvent.BEGIN_SWAP): SlotPhase.SWAPPING,
        (SlotPhase.DRAINING, SlotEvent.VACATE): SlotPhase.EMPTY,
        (SlotPhase.SWAPPING, SlotEvent.SWAP_DONE): SlotPhase.SERVING,
        (SlotPhase.SWAPPING, SlotEvent.SWAP_FAILED): SlotPhase.EMPTY,
    }
)


def transition(phase: SlotPhase, event: SlotEvent) -> SlotPhase:
    """The phase that follows; raises ``IllegalTransition`` when the table has no such row."""
    following = TRANSITIONS.get((phase, event))
    if following is None:
        raise IllegalTransition(phase, event)
    return following
