"""An event loop in which time is free: waiting for a timer jumps the clock to it.

For coroutines that use nothing but timers, futures and tasks. When every task is blocked and no
timer is armed, nothing can ever happen again; that raises ``Deadlock`` and makes every test a
liveness check.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(AssertionError):
    """All tasks are blocked and no timer is armed."""


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Deadlock("every task is blocked and no timer is armed")
        self.now_s += timeout
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s

    def time_ms(self) -> float:
        return self._jumping.now_s * 1000.0


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run to the end in virtual time; leaves no task behind."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


def now_ms() -> float:
    """The running loop's virtual time."""
    return asyncio.get_running_loop().time() * 1000.0
