"""Circuit breakers: when an expert or a host is left alone, and when it is tried again. Pure.

Closed: calls pass, their outcomes are counted. Too many failures in a row, or too large a share of
failures in a sliding window, open it. Open: no call passes until a back-off is over. Half open: one
call at a time passes as a probe; its success closes the breaker, its failure opens it again with
twice the back-off. M. Nygard, "Release It!", 2nd ed., 2018, section 5.

``breaker_common.lua`` holds the same rules for the breakers that gateways share through the store;
a test plays random histories to both and compares.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from experts.errors import CoeError, ExpertFailed, HostLost, UpstreamTimeout

__all__ = [
    "Breaker",
    "BreakerRules",
    "BreakerState",
    "Calls",
    "Probe",
    "expert_target",
    "faults",
    "host_target",
]

SLOTS = 10  # the window slides by a tenth of its length


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Probe(StrEnum):
    """What became of a probe. ``ABANDONED``: it ended without saying anything of the upstream."""

    OK = "ok"
    FAILED = "failed"
    ABANDONED = "abandoned"


@dataclass(frozen=True, slots=True)
class BreakerRules:
    """``failures_in_a_row`` opens at once; ``failure_share`` needs ``calls_min`` in ``window_ms``.

    ``open_ms`` is the first back-off, doubled by each failed probe up to ``open_max_ms``. A probe
    that is never heard of again (its gateway died) gives its place up after ``probe_lease_ms``.
    """

    failures_in_a_row: int = 5
    failure_share: float = 0.5
    calls_min: int = 20
    window_ms: int = 10_000
    open_ms: int = 2_000
    open_max_ms: int = 30_000
    probe_lease_ms: int = 30_000

    @property
    def slot_ms(self) -> int:
        return max(1, self.window_ms // SLOTS)


@dataclass(frozen=True, slots=True)
class Calls:
    """Outcomes since the last report. ``failed_last``: failures since the last success."""

    ok: int = 0
    failed: int = 0
    failed_last: int = 0

    def with_ok(self) -> Calls:
        return Calls(self.ok + 1, self.failed, 0)

    def with_failure(self) -> Calls:
        return Calls(self.ok, self.failed + 1, self.failed_last + 1)


@dataclass(slots=True)
class Breaker:
    """One target's breaker. Whole milliseconds on the caller's clock; ``open_until_ms`` 0: closed.

    ``slots``: number of a tenth of the window -> [successes, failures] in it.
    """

    in_a_row: int = 0
    open_until_ms: int = 0
    backoff_ms: int = 0
    probe_until_ms: int = 0
    slots: dict[int, list[int]] = field(default_factory=dict)

    def state(self, now_ms: int) -> BreakerState:
        if self.open_until_ms == 0:
            return BreakerState.CLOSED
        return BreakerState.OPEN if now_ms < self.open_until_ms else BreakerState.HALF_OPEN

    def wait_ms(self, now_ms: int) -> int:
        """Until a call may be tried; 0 when it may now."""
        if self.open_until_ms == 0:
            return 0
        return max(0, max(self.open_until_ms, self.probe_until_ms) - now_ms)

    def record(self, rules: BreakerRules, calls: Calls, now_ms: int) -> None:
        """Count calls that ended. Those of a breaker that is not closed began before it opened."""
        if self.open_until_ms != 0:
            return
        slot = now_ms // rules.slot_ms
        counts = self.slots.get(slot)
        if counts is None:  # on the window's move, not at every call
            oldest = slot - SLOTS
            self.slots = {n: old for n, old in self.slots.items() if n > oldest}
            counts = self.slots[slot] = [0, 0]
        counts[0] += calls.ok
        counts[1] += calls.failed
        self.in_a_row = calls.failed_last if calls.ok else self.in_a_row + calls.failed
        if calls.failed and self._too_many(rules):
            self.open(rules.open_ms, now_ms)

    def open(self, for_ms: int, now_ms: int) -> None:
        """Let nothing pass for this long."""
        self.open_until_ms, self.backoff_ms = now_ms + for_ms, for_ms
        self.in_a_row, self.probe_until_ms, self.slots = 0, 0, {}

    def claim(self, rules: BreakerRules, now_ms: int) -> bool:
        """Take the probe's place. False unless half open with nobody probing."""
        if self.open_until_ms == 0 or self.wait_ms(now_ms) > 0:
            return False
        self.probe_until_ms = now_ms + rules.probe_lease_ms
        return True

    def probed(self, rules: BreakerRules, outcome: Probe, now_ms: int) -> None:
        """A probe ended."""
        if self.open_until_ms == 0:
            return
        if outcome is Probe.OK:
            self.open_until_ms = self.backoff_ms = self.probe_until_ms = 0
        elif outcome is Probe.FAILED:
            self.open(min(rules.open_max_ms, 2 * self.backoff_ms), now_ms)
        else:
            self.probe_until_ms = 0

    def _too_many(self, rules: BreakerRules) -> bool:
        if self.in_a_row >= rules.failures_in_a_row:
            return True
        ok = sum(counts[0] for counts in self.slots.values())
        failed = sum(counts[1] for counts in self.slots.values())
        return ok + failed >= rules.calls_min and failed >= rules.failure_share * (ok + failed)


def expert_target(expert: str) -> str:
    return f"expert:{expert}"


def host_target(host: str) -> str:
    return f"host:{host}"


def faults(error: CoeError, expert: str, host: str, *, short_of_time: bool) -> tuple[str, ...]:
    """The targets that a failed call speaks against; none for a request at fault or a full queue.

    ``host`` is empty for an expert without hosts of ours: then a broken connection is the expert's
    fault. ``short_of_time``: the caller's own deadline, or the stages before, left less than an
    answer takes; a timeout then says nothing, or any caller could close an expert to all others.
    """
    if isinstance(error, ExpertFailed):
        return (expert_target(expert),) if error.status >= 500 else ()
    if isinstance(error, UpstreamTimeout) and error.phase != "connect":
        if short_of_time and error.phase != "between tokens":
            return ()
        return (expert_target(expert), host_target(host)) if host else (expert_target(expert),)
    if isinstance(error, HostLost | UpstreamTimeout):
        return (host_target(host),) if host else (expert_target(expert),)
    return ()
