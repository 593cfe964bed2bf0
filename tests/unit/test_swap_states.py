"""The transition table: complete, and the same in the code and in the design note."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest

import deployments.swap.states as states
from deployments.swap.config import SchedulerConfig
from deployments.swap.states import (
    TRANSITIONS,
    IllegalTransition,
    SlotEvent,
    SlotPhase,
    transition,
)

NOTE = Path(states.__file__).with_name("design.md")
ROW = re.compile(r"^\| (\w+) \| (\w+) \| (\w+) \|$", re.MULTILINE)


def test_the_design_note_holds_the_same_table() -> None:
    section = NOTE.read_text().split("## Phases")[1].split("## ")[0]
    rows = [row for row in ROW.findall(section) if row[0] != "phase"]
    noted = {(SlotPhase(a), SlotEvent(e)): SlotPhase(b) for a, e, b in rows}
    assert noted == dict(TRANSITIONS)
    assert len(rows) == len(noted), "a row is there twice"


@pytest.mark.parametrize(("phase", "event"), list(itertools.product(SlotPhase, SlotEvent)))
def test_every_pair_is_either_in_the_table_or_illegal(phase: SlotPhase, event: SlotEvent) -> None:
    if (phase, event) in TRANSITIONS:
        assert transition(phase, event) is TRANSITIONS[phase, event]
    else:
        with pytest.raises(IllegalTransition, match=event.value):
            transition(phase, event)


def test_no_phase_is_a_trap() -> None:
    """From every phase the slot can come to serve."""
    reached = {SlotPhase.SERVING}
    while found := {a for (a, _), b in TRANSITIONS.items() if b in reached} - reached:
        reached |= found
    assert reached == set(SlotPhase)


@pytest.mark.parametrize(
    "wrong",
    [
        {"queue_max": 0},
        {"in_flight_max": 0},
        {"age_bound_ms": 0.0},
        {"min_residency_ms": -1.0},
        {"min_residency_ms": 40_000.0},
        {"swap_timeout_ms": float("inf")},
        {"measure_weight": 0.0},
        {"announce_weight": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SchedulerConfig(**wrong)  # type: ignore[arg-type]
