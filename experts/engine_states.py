"""Several engines on one device, of which one is awake: their states, and the next step. Pure.

Each engine runs the experts of one architecture. All but one sleep (vLLM sleep mode, level 1:
weights in host memory, cache discarded, addresses kept). ``TRANSITIONS`` is the whole table; the
table in ``deployments/swap/design.md`` repeats it and a test keeps the two equal.

Two rules make it safe on a device. Transitions are serialised: nothing begins while an engine is
between states, because vLLM's own checks compare free memory before and after and would trip over
a neighbour's allocation. And an engine is put to sleep before another wakes or starts, because the
device holds one engine's weights and cache beside what sleepers leave behind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

__all__ = [
    "TRANSITIONS",
    "Action",
    "EngineEvent",
    "EngineState",
    "IllegalEngineTransition",
    "Step",
    "next_step",
    "transition",
]


class EngineState(StrEnum):
    ABSENT = "absent"  # no process
    STARTING = "starting"
    AWAKE = "awake"
    FALLING_ASLEEP = "falling_asleep"
    ASLEEP = "asleep"
    WAKING = "waking"
    HALF_AWAKE = "half_awake"  # a wake failed part of the way; vLLM can only go on with it


class EngineEvent(StrEnum):
    START = "start"
    STARTED = "started"
    SLEEP = "sleep"
    SLEPT = "slept"
    WAKE = "wake"
    WOKE = "woke"
    FAILED = "failed"  # the transition under way
    ENDED = "ended"  # the process was stopped, or died


class IllegalEngineTransition(RuntimeError):
    """An event reached an engine in a state in which it cannot happen: a bug, never load."""


_S, _E = EngineState, EngineEvent
TRANSITIONS: Mapping[tuple[EngineState, EngineEvent], EngineState] = MappingProxyType(
    {
        (_S.ABSENT, _E.START): _S.STARTING,
        (_S.STARTING, _E.STARTED): _S.AWAKE,
        (_S.STARTING, _E.FAILED): _S.ABSENT,
        (_S.AWAKE, _E.SLEEP): _S.FALLING_ASLEEP,
        (_S.AWAKE, _E.ENDED): _S.ABSENT,
        (_S.FALLING_ASLEEP, _E.SLEPT): _S.ASLEEP,
        (_S.FALLING_ASLEEP, _E.FAILED): _S.ABSENT,
        (_S.ASLEEP, _E.WAKE): _S.WAKING,
        (_S.ASLEEP, _E.ENDED): _S.ABSENT,
        (_S.WAKING, _E.WOKE): _S.AWAKE,
        (_S.WAKING, _E.FAILED): _S.HALF_AWAKE,
        (_S.HALF_AWAKE, _E.WAKE): _S.WAKING,
        (_S.HALF_AWAKE, _E.ENDED): _S.ABSENT,
    }
)
_SETTLED = frozenset({_S.ABSENT, _S.AWAKE, _S.ASLEEP})


def transition(state: EngineState, event: EngineEvent) -> EngineState:
    """The state that follows; raises ``IllegalEngineTransition`` when the table has no such row."""
    following = TRANSITIONS.get((state, event))
    if following is None:
        raise IllegalEngineTransition(f"event {event.value!r} cannot happen while {state.value!r}")
    return following


class Action(StrEnum):
    """What may have to be done before an engine can serve."""

    SLEEP = "sleep"
    WAKE = "wake"
    START = "start"
    KILL = "kill"


@dataclass(frozen=True, slots=True)
class Step:
    action: Action
    engine: str


def next_step(states: Mapping[str, EngineState], wanted: str) -> Step | None:
    """The next thing to do so that ``wanted`` becomes the engine that is awake; None: it is.

    A half-awake engine holds memory that nobody can count on, so it goes first: the wanted one is
    woken again (once; see ``EngineGroup``), any other is killed. Raises IllegalEngineTransition
    when an engine is between two states: steps never overlap.
    """
    for engine, state in states.items():
        if state not in _SETTLED and state is not EngineState.HALF_AWAKE:
            raise IllegalEngineTransition(f"{engine} is {state.value}: one transition at a time")
    for engine, state in states.items():
        if engine != wanted and state is EngineState.HALF_AWAKE:
            return Step(Action.KILL, engine)
        if engine != wanted and state is EngineState.AWAKE:
            return Step(Action.SLEEP, engine)
    match states[wanted]:
        case EngineState.AWAKE:
            return None
        case EngineState.ABSENT:
            return Step(Action.START, wanted)
        case _:
            return Step(Action.WAKE, wanted)
