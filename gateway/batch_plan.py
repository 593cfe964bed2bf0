"""What a batch decides: the order of lines, when to try one again, what it all came to.

Pure: time, randomness and answers are arguments. Lines are known by their index in the input file.
Grouping by expert is Symbolic-MoE's (arXiv 2503.05641): all requests of one expert run together, so
that each expert is loaded once.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gateway.batch_lines import Answer, Charge, Lost, error_code

__all__ = [
    "NO_EXPERT",
    "Group",
    "RetryRule",
    "Tally",
    "duplicates",
    "expert_changes",
    "make_groups",
]

Indices = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int32]
Digests = npt.NDArray[np.bytes_]

NO_EXPERT = -1  # the code of a line that nobody could route

# 502 is a host that went away under the request. 504 comes with x-should-retry: false from the
# gateway, since the work would be paid again; from a proxy it comes without.
_TRY_AGAIN = frozenset({408, 429, 502, 503, 504})

# Nothing was wrong, nothing was begun: there was no time or no allowance for it just now.
_BUSY = frozenset(
    {"queue_full", "connection_pool_full", "deadline_unreachable", "rate_limit_exceeded"}
)


# --- order ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Group:
    """Lines that one expert is expected to serve, in input order. ``expert`` None: not routed."""

    expert: str | None
    lines: Indices
    resident: bool = False


def make_groups(lines: Indices, codes: Codes, names: Sequence[str]) -> list[Group]:
    """Split ``lines`` by ``codes`` (as long; ``names[code]`` is the expert). Not ordered yet."""
    by_expert = np.argsort(codes, kind="stable")  # stable: input order survives inside a group
    starts = np.flatnonzero(np.diff(codes[by_expert])) + 1
    parts = [part for part in np.split(by_expert, starts) if part.size]
    return [
        Group(None if (code := int(codes[part[0]])) == NO_EXPERT else names[code], lines[part])
        for part in parts
    ]


def run_order(groups: Sequence[Group], resident: Set[str]) -> list[Group]:
    """Resident experts first, then the largest group; equals keep the order of their first line.

    Lines that could not be routed come last: nothing is known of what they need.
    """
    known = [Group(g.expert, g.lines, g.expert in resident) for g in groups]
    return sorted(
        known, key=lambda g: (g.expert is None, not g.resident, -g.lines.size, int(g.lines[0]))
    )


def expert_changes(codes: Codes) -> int:
    """How often the expert differs from that of the line before; unrouted lines are passed over."""
    routed = codes[codes != NO_EXPERT]
    return int(np.count_nonzero(np.diff(routed)))


def duplicates(digests: Digests) -> list[tuple[int, int]]:
    """(line, earlier line with the same id) for each line whose id was used before, ascending."""
    order = np.argsort(digests, kind="stable")
    ranked = digests[order]
    same = np.flatnonzero(ranked[1:] == ranked[:-1]) + 1
    return sorted((int(order[at]), int(order[at - 1])) for at in same)


# --- trying again --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RetryRule:
    """Exponential back-off with full jitter (M. Brooker, AWS, 2015), never before retry-after.

    ``attempts`` counts the first one. A retry-after beyond ``retry_after_max_s`` is cut to it. A
    refusal for want of time or allowance is no attempt; it is waited out for ``busy_s_max``.
    """

    attempts: int = 8
    base_s: float = 0.5
    cap_s: float = 30.0
    retry_after_max_s: float = 120.0
    busy_s_max: float = 3_600.0

    def wait_s(self, outcome: Answer | Lost, attempt: int, draw: float) -> float | None:
        """Seconds to wait after the ``attempt``-th outcome (from 1); None: it is final.

        ``draw`` is uniform in [0, 1).
        """
        if attempt >= self.attempts or not is_worth_retrying(outcome):
            return None
        jitter_s = draw * min(self.cap_s, self.base_s * 2.0 ** (attempt - 1))
        return self._not_before_s(outcome) + jitter_s

    def busy_wait_s(self, outcome: Answer | Lost, asked_for_s: float, draw: float) -> float | None:
        """Seconds to wait after a refusal for want of time; None: it is none, or has lasted long
        enough. ``asked_for_s``: since the line was first sent.

        The gateway has measured when there will be time, so the jitter stays small.
        """
        if not is_busy(outcome) or asked_for_s >= self.busy_s_max:
            return None
        return self._not_before_s(outcome) + draw * self.base_s

    def _not_before_s(self, outcome: Answer | Lost) -> float:
        asked_s = outcome.retry_after_s if isinstance(outcome, Answer) else None
        return min(asked_s or 0.0, self.retry_after_max_s)


def is_worth_retrying(outcome: Answer | Lost) -> bool:
    """The gateway's own word counts first: it knows whether a retry would be paid twice."""
    if isinstance(outcome, Lost):
        return True
    return outcome.status in _TRY_AGAIN and outcome.should_retry is not False


def is_busy(outcome: Answer | Lost) -> bool:
    """Whether it was refused only because there is no time or no allowance for it now."""
    if isinstance(outcome, Lost) or not is_worth_retrying(outcome):
        return False
    return outcome.status in (429, 503) and error_code(outcome) in _BUSY


# --- totals --------------------------------------------------------------------------------------


@dataclass(slots=True)
class ExpertTotal:
    lines: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_micro_usd: int = 0

    def add(self, charge: Charge) -> None:
        self.lines += 1
        self.failed += not charge.ok
        self.input_tokens += charge.input_tokens
        self.output_tokens += charge.output_tokens
        self.cost_micro_usd += charge.cost_micro_usd


@dataclass(slots=True)
class Tally:
    """Totals over output lines, per expert that answered; under "" where none did."""

    experts: dict[str, ExpertTotal] = field(default_factory=dict)

    def add(self, charge: Charge) -> None:
        self.experts.setdefault(charge.expert or "", ExpertTotal()).add(charge)

    @property
    def total(self) -> ExpertTotal:
        whole = ExpertTotal()
        for one in self.experts.values():
            whole.lines += one.lines
            whole.failed += one.failed
            whole.input_tokens += one.input_tokens
            whole.output_tokens += one.output_tokens
            whole.cost_micro_usd += one.cost_micro_usd
        return whole
