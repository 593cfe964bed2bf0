"""When a failed call may be made again, and after which pause. Pure: time and randomness come in.

Only a call that has shown nothing to the caller is made again (``gateway.caller`` sees to it).
The pause is "full jitter": uniform between zero and an exponentially growing bound (M. Brooker,
"Exponential Backoff And Jitter", AWS Architecture Blog, 2015). The budget is a token bucket that
requests fill and retries empty, as in Finagle's ``RetryBudget``: an upstream that is down gets a
tenth more calls, not twice as many.
"""

from __future__ import annotations

from dataclasses import dataclass

from experts.errors import CoeError, ExpertFailed, HostLost, UpstreamTimeout

__all__ = ["RetryBudget", "RetryRules", "is_transient"]

_TRANSIENT = frozenset({500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class RetryRules:
    """``per_stage``: calls of one expert beyond the first. ``budget_ratio``: retries per request.

    ``budget_burst``: retries that may come at once; as many are there at the start.
    ``budget_per_s``: what the budget regains where there is next to no traffic.
    """

    per_stage: int = 1
    base_ms: float = 50.0
    cap_ms: float = 1_000.0
    budget_ratio: float = 0.1
    budget_burst: float = 20.0
    budget_per_s: float = 0.1

    def pause_ms(self, retry: int, random01: float, left_ms: float) -> float | None:
        """The wait before retry number ``retry`` (from 0); None when none is allowed.

        ``random01`` is uniform in [0, 1). ``left_ms``: what the request has left of its time; a
        pause that would use up half of it leaves too little for an answer.
        """
        if retry >= self.per_stage:
            return None
        pause = random01 * min(self.cap_ms, self.base_ms * 2.0**retry)
        return pause if pause < left_ms / 2 else None


class RetryBudget:
    """How many retries may still be made. ``now_ms`` is any monotonic clock, always the same."""

    def __init__(self, rules: RetryRules, now_ms: float) -> None:
        self._rules = rules
        self._level = rules.budget_burst
        self._at_ms = now_ms

    @property
    def level(self) -> float:
        """Retries that may be made at once."""
        return self._level

    def note_request(self, now_ms: float) -> None:
        """A first call was made."""
        self._refill(self._rules.budget_ratio, now_ms)

    def take(self, now_ms: float) -> bool:
        """Pay for one retry; False when the budget does not reach."""
        self._refill(0.0, now_ms)
        if self._level < 1.0:
            return False
        self._level -= 1.0
        return True

    def _refill(self, amount: float, now_ms: float) -> None:
        idle_s = max(0.0, now_ms - self._at_ms) / 1000.0
        self._at_ms = max(now_ms, self._at_ms)
        gained = amount + idle_s * self._rules.budget_per_s
        self._level = min(self._rules.budget_burst, self._level + gained)


def is_transient(error: CoeError) -> bool:
    """Whether the same call may succeed a moment later at the same place.

    A timeout after the connection was made is not: the time is gone, and the work was under way.
    """
    if isinstance(error, ExpertFailed):
        return error.status in _TRANSIENT
    if isinstance(error, UpstreamTimeout):
        return error.phase == "connect"
    return isinstance(error, HostLost)
