"""Progress of long work where there is no terminal to draw a bar on: a line now and then."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["LINE_EVERY_S", "ProgressLines"]

LINE_EVERY_S = 10.0


class ProgressLines:
    """Writes a line when a stage begins, when it ends, and every ``LINE_EVERY_S`` in between.

    ``now_s`` is monotonic; ``write`` takes a line without its end.
    """

    def __init__(self, now_s: Callable[[], float], write: Callable[[str], None]) -> None:
        self._now_s = now_s
        self._write = write
        self._began_s = now_s()
        self._last_s: dict[str, float] = {}  # by stage
        self._ended: set[str] = set()

    def __call__(self, stage: str, done: int, total: int) -> None:
        now_s = self._now_s()
        ends = done >= total
        if ends and stage in self._ended:
            return
        due = now_s - self._last_s.get(stage, float("-inf")) >= LINE_EVERY_S
        if not (due or ends):
            return
        self._last_s[stage] = now_s
        if ends:
            self._ended.add(stage)
        else:
            self._ended.discard(stage)  # it is done again, for another part
        self._write(f"{now_s - self._began_s:8.1f} s  {stage}  {done}/{total}")
