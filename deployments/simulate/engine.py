"""One engine's progress: a prompt at a time, then all sequences together.

The model, in full. Prompts are processed one after another in the order in which their requests
start, at a constant rate; the end of the prompt is the first token. While a prompt is processed no
sequence decodes (prefill first, without chunking). Otherwise every running sequence gains one token
per step, and a step of b sequences lasts ``EngineSpeed.step_ms(b)``. Engines that share an
accelerator take turns, so each of n active ones runs at 1/n of its speed.

Because all sequences gain tokens alike, a sequence ends when the engine's count of steps reaches
the count at its start plus its length; the next end is the smallest of these (processor sharing in
virtual time), and a change of the batch changes no entry.
"""

from __future__ import annotations

import heapq
import math
from collections import deque

from deployments.simulate.cluster import EngineSpeed
from deployments.simulate.job import Job

__all__ = ["EngineModel"]

_NEVER_MS = math.inf
_TOKEN_SLACK = 1e-6  # of a token: what rounding may leave of a finished one


class EngineModel:
    """Mutable state of one engine. ``share``: the part of the accelerator that it has now."""

    def __init__(self, speed: EngineSpeed) -> None:
        self._speed = speed
        self._prefills: deque[Job] = deque()
        self._prefill_left_tokens = 0.0
        self._decoding: list[tuple[float, int, Job]] = []
        self._steps = 0.0
        self._step_ms = _NEVER_MS
        self._seq = 0
        self._at_ms = 0.0
        self.share = 1.0

    @property
    def running(self) -> int:
        return len(self._prefills) + len(self._decoding)

    def add(self, job: Job, now_ms: float) -> None:
        self.advance(now_ms)
        self._prefills.append(job)
        if len(self._prefills) == 1:
            self._prefill_left_tokens = float(job.input_tokens)

    def remove_unsent(self, job: Job, now_ms: float) -> None:
        """Take back a request whose prompt has not ended. Raises ValueError for any other."""
        self.advance(now_ms)
        was_first = self._prefills and self._prefills[0] is job
        self._prefills.remove(job)
        if was_first:
            self._load_next_prompt()

    def advance(self, now_ms: float) -> None:
        """Progress until now; never past the next event (``next_event_ms``)."""
        elapsed_ms, self._at_ms = now_ms - self._at_ms, now_ms
        if self._prefills:
            rate = self._speed.prefill_tokens_per_s / 1e3 * self.share
            self._prefill_left_tokens -= elapsed_ms * rate
        elif self._decoding:
            self._steps += elapsed_ms * self.share / self._step_ms

    def next_event_ms(self) -> float:
        """When, if nothing changes, the next prompt or answer ends; infinite when idle."""
        if self._prefills:
            rate = self._speed.prefill_tokens_per_s / 1e3 * self.share
            return self._at_ms + max(0.0, self._prefill_left_tokens) / rate
        if self._decoding:
            steps = max(0.0, self._decoding[0][0] - self._steps)
            return self._at_ms + steps * self._step_ms / self.share
        return _NEVER_MS

    def take_prompt_end(self) -> Job | None:
        """The request whose prompt has ended by now; it decodes from here on."""
        if not self._prefills or self._prefill_left_tokens > _TOKEN_SLACK:
            return None
        job = self._prefills.popleft()
        self._load_next_prompt()
        self._seq += 1
        ends = self._steps + job.output_tokens - 1  # the prompt's end gave the first token
        heapq.heappush(self._decoding, (ends, self._seq, job))
        self._step_ms = self._speed.step_ms(len(self._decoding))
        return job

    def take_answer_end(self) -> Job | None:
        """A request that has all its tokens by now."""
        if self._prefills or not self._decoding:
            return None
        if self._decoding[0][0] - self._steps > _TOKEN_SLACK:
            return None
        job = heapq.heappop(self._decoding)[2]
        if self._decoding:
            self._step_ms = self._speed.step_ms(len(self._decoding))
        return job

    def _load_next_prompt(self) -> None:
        if self._prefills:
            self._prefill_left_tokens = float(self._prefills[0].input_tokens)
