"""The scheduler as a state machine: Hypothesis looks for a sequence of events that breaks a rule.

The model is a host that does what it is told and keeps its own books. Unlike the simulation it has
no probabilities: every order of events is as good as any other, and a failure shrinks to its core.
"""

from __future__ import annotations

import os
from dataclasses import replace

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deployments.swap.config import SchedulerConfig
from deployments.swap.core import Scheduler
from deployments.swap.effects import (
    AbortInFlight,
    BeginSwap,
    Effect,
    Grant,
    Refusal,
    Refuse,
    WakeAt,
)
from deployments.swap.states import SlotPhase

EXPERTS = ("a", "b", "c")
CONFIG = SchedulerConfig(
    queue_max=5,
    in_flight_max=2,
    age_bound_ms=100,
    min_residency_ms=30,
    drain_deadline_ms=50,
    queue_wait_ms_max=2_000,
    announce_ttl_ms=80,
)
experts = st.sampled_from(EXPERTS)
picks = st.integers(0, 1_000)


class Host(RuleBasedStateMachine):
    config = CONFIG

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler(self.config, EXPERTS)
        self.now_ms = 0.0
        self.number = 0
        self.wants: dict[str, str] = {}
        self.waiting: set[str] = set()
        self.running: set[str] = set()
        self.sent: set[str] = set()
        self.aborting: set[str] = set()
        self.retired: set[str] = set()
        self.swapping: str | None = None
        self.wake_ms: float | None = None

    # --- effects ---------------------------------------------------------------------------------

    def do(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Grant(name):
                    assert name in self.waiting
                    assert self.swapping is None
                    assert self.scheduler.resident == self.wants[name]
                    assert self.wants[name] not in self.retired
                    self.waiting.discard(name)
                    self.running.add(name)
                case Refuse(name):
                    assert name in self.waiting, "refused after its end, or while it runs"
                    assert (effect.reason is Refusal.OUT_OF_SERVICE) == (
                        self.wants[name] in self.retired
                    )
                    self.waiting.discard(name)
                case BeginSwap(expert):
                    assert self.swapping is None
                    assert not self.running
                    assert expert not in self.retired
                    assert expert in {self.wants[name] for name in self.waiting}
                    self.swapping = expert
                case AbortInFlight(names):
                    assert set(names) <= self.running - self.sent - self.aborting
                    self.aborting.update(names)
                case WakeAt(at_ms):
                    self.wake_ms = at_ms

    def pick(self, names: set[str], choice: int) -> str:
        return sorted(names)[choice % len(names)]

    def end(self, name: str) -> None:
        for names in (self.waiting, self.running, self.sent, self.aborting):
            names.discard(name)

    # --- what can happen -------------------------------------------------------------------------

    @rule(
        expert=experts,
        priority=st.integers(-6, 6),
        deadline_ms=st.none() | st.floats(0, 500),
    )
    def arrive(self, expert: str, priority: int, deadline_ms: float | None) -> None:
        self.number += 1
        name = f"r{self.number:04}"
        self.wants[name] = expert
        self.waiting.add(name)
        self.do(
            self.scheduler.arrive(
                name, expert, priority=priority, deadline_ms=deadline_ms, now_ms=self.now_ms
            )
        )

    @precondition(lambda self: self.waiting | self.running)
    @rule(choice=picks)
    def client_leaves(self, choice: int) -> None:
        name = self.pick(self.waiting | self.running, choice)
        self.end(name)
        self.do(self.scheduler.cancel(name, self.now_ms))

    @precondition(lambda self: self.running)
    @rule(choice=picks)
    def first_token(self, choice: int) -> None:
        name = self.pick(self.running, choice)
        allowed = self.scheduler.first_token(name)
        assert allowed == (name not in self.aborting)
        if allowed:
            self.sent.add(name)

    @precondition(lambda self: self.running - self.aborting)
    @rule(choice=picks)
    def finish(self, choice: int) -> None:
        name = self.pick(self.running - self.aborting, choice)
        self.end(name)
        self.do(self.scheduler.finish(name, self.now_ms))

    @precondition(lambda self: self.aborting)
    @rule(choice=picks)
    def requeue(self, choice: int) -> None:
        name = self.pick(self.aborting, choice)
        self.end(name)
        self.waiting.add(name)
        self.do(self.scheduler.requeue(name, self.now_ms))

    @precondition(lambda self: self.swapping)
    @rule(works=st.booleans(), swap_ms=st.floats(1, 200))
    def swap_ends(self, works: bool, swap_ms: float) -> None:
        expert, self.swapping = self.swapping, None
        assert expert is not None
        if works:
            self.do(self.scheduler.swap_done(expert, self.now_ms, swap_ms))
        else:
            self.retired.add(expert)
            self.do(self.scheduler.swap_failed(expert, "canary", self.now_ms))

    @rule(expert=experts)
    def announce(self, expert: str) -> None:
        self.do(self.scheduler.announce(expert, self.now_ms))

    @rule(expert=experts)
    def retire(self, expert: str) -> None:
        self.retired.add(expert)
        self.do(self.scheduler.retire(expert, "operator", self.now_ms))

    @precondition(lambda self: self.retired)
    @rule(choice=picks)
    def restore(self, choice: int) -> None:
        expert = self.pick(self.retired, choice)
        self.retired.discard(expert)
        self.do(self.scheduler.restore(expert, self.now_ms))

    @precondition(lambda self: self.wake_ms is not None)
    @rule()
    def wake(self) -> None:
        assert self.wake_ms is not None
        self.now_ms = max(self.now_ms, self.wake_ms)
        self.wake_ms = None
        self.do(self.scheduler.tick(self.now_ms))
        assert self.wake_ms is None or self.wake_ms > self.now_ms, "woken for nothing, for ever"

    @rule(step_ms=st.floats(0, 60))
    def time_passes(self, step_ms: float) -> None:
        """Not past the wake-up: a late timer is the simulation's business."""
        limit_ms = self.now_ms + step_ms
        self.now_ms = limit_ms if self.wake_ms is None else min(limit_ms, self.wake_ms)

    # --- what always holds -----------------------------------------------------------------------

    @invariant()
    def books_agree(self) -> None:
        assert self.scheduler.queued_ids == self.waiting
        assert self.scheduler.in_flight_ids == self.running
        assert (self.scheduler.phase is SlotPhase.SWAPPING) == (self.swapping is not None)

    @invariant()
    def bounds_hold(self) -> None:
        assert len(self.running) <= CONFIG.in_flight_max
        assert len(self.waiting) <= CONFIG.queue_max + CONFIG.in_flight_max

    @invariant()
    def nobody_waits_in_vain(self) -> None:
        if not self.waiting:
            return
        assert self.wake_ms is not None
        assert self.scheduler.phase is not SlotPhase.EMPTY
        if self.scheduler.phase is SlotPhase.SERVING:
            wanted = {self.wants[name] for name in self.waiting}
            full = len(self.running) == CONFIG.in_flight_max
            assert self.running, "an idle slot"
            assert full or self.scheduler.resident not in wanted

    @invariant()
    def answers_to_questions_make_sense(self) -> None:
        for expert in EXPERTS:
            wait_ms = self.scheduler.expected_wait_ms(expert, self.now_ms)
            assert wait_ms >= 0.0
            assert (wait_ms == float("inf")) == (expert in self.retired)


class HostWithoutANumber(Host):
    """The wait is bounded by age bound, drain deadline and one swap."""

    config = replace(CONFIG, queue_wait_ms_max=None)


SETTINGS = settings(
    max_examples=int(os.environ.get("COE_PROPERTY_EXAMPLES", "100")) // 2,
    stateful_step_count=60,
    deadline=None,
)
TestScheduler = Host.TestCase
TestScheduler.settings = SETTINGS
TestSchedulerWithoutANumber = HostWithoutANumber.TestCase
TestSchedulerWithoutANumber.settings = SETTINGS
