"""Progress of long work on a terminal: what, how far, how long.

One line per step when it begins and when it ends. While a step is silent for long, a line says that
it still runs, so that nobody has to guess whether it hangs. Goes to standard error: standard output
belongs to results.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

_STILL_RUNNING_EVERY_S = 10.0


class Progress:
    """Numbered steps with elapsed time."""

    def __init__(
        self,
        steps: int,
        *,
        out: TextIO = sys.stderr,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._steps = steps
        self._out = out
        self._clock = clock
        self._started = clock()
        self._at = 0

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._started

    @contextmanager
    def step(self, title: str) -> Iterator[Callable[[str], None]]:
        """Announce a step; the yielded function reports what it is doing right now."""
        self._at += 1
        began = self._clock()
        last = [title]

        def note(text: str) -> None:
            last[0] = text
            self._line(f"      {text}")

        self._line(f"[{self._at}/{self._steps}] {title}")
        done = threading.Event()
        thread = threading.Thread(target=self._nudge, args=(done, last), daemon=True)
        thread.start()
        try:
            yield note
        finally:
            done.set()
            thread.join()
        self._line(f"      done in {self._clock() - began:.1f} s")

    def _nudge(self, done: threading.Event, last: list[str]) -> None:
        while not done.wait(_STILL_RUNNING_EVERY_S):
            self._line(f"      still at it: {last[0]}")

    def _line(self, text: str) -> None:
        print(f"{self.elapsed_s:6.1f} s  {text}", file=self._out, flush=True)
