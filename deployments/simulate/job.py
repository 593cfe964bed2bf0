"""A request in one replay: its arrival, and what becomes of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

__all__ = ["Job", "JobState"]


class JobState(Enum):
    WAITING = 1
    RUNNING = 2
    SERVED = 3
    MISSED = 4


@dataclass(slots=True, eq=False)
class Job:
    """Times in milliseconds; NaN until they are known. ``hit``: the residency that served it had
    begun when it arrived, so that no swap stood between them.
    """

    id: str
    expert: str
    arrived_ms: float
    input_tokens: int
    output_tokens: int
    state: JobState = JobState.WAITING
    slot: int = -1
    started_ms: float = math.nan
    first_token_ms: float = math.nan
    ended_ms: float = math.nan
    hit: bool = False
    starts: int = 0

    @property
    def waiting(self) -> bool:
        return self.state is JobState.WAITING

    @property
    def sent(self) -> bool:
        return not math.isnan(self.first_token_ms)
