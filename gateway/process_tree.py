"""Leave no process behind: adopt orphans, and end every descendant at the end.

A killed Ray replica can leave its engine's processes behind, and a killed supervisor its children.
As a child subreaper this process inherits such orphans instead of init, so that they can be found
and stopped; children started by us ask the kernel to be killed when we die.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_ROUNDS_MAX = 3
# Loaded here: a child between fork and exec must not call the loader, whose lock a thread that was
# not forked along may hold.
_LIBC = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent died. Linux only."""
    if sys.platform == "linux":
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def child_pids() -> frozenset[int]:
    """The processes that are this one's children now."""
    return frozenset(process.pid for process in psutil.Process().children())


def bury_orphans(own: frozenset[int]) -> None:
    """Reap adopted processes that have ended. ``own`` are waited for by whoever started them."""
    for process in psutil.Process().children():
        if process.pid in own:
            continue
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                os.waitpid(process.pid, os.WNOHANG)
        except (psutil.NoSuchProcess, ChildProcessError):
            continue


def dies_with_us() -> Callable[[], None]:
    """For a child between fork and exec: be terminated when this process dies. Linux only."""
    parent = os.getpid()

    def arm() -> None:
        if sys.platform == "linux":
            _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)  # it died before that, and no signal will come

    return arm


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def end_descendants(*, grace_s: float, report: Callable[[str], None]) -> int:
    """Terminate, then kill, every process below this one; returns how many would not go.

    What they start while they are being stopped goes the same way, for a few rounds.
    """
    for _ in range(_ROUNDS_MAX):
        processes = psutil.Process().children(recursive=True)
        if not processes:
            return 0
        for process in processes:
            _signal(process, signal.SIGTERM)
        _, alive = psutil.wait_procs(processes, timeout=grace_s)
        for process in alive:
            report(f"killing {process.pid}, which did not stop")
            _signal(process, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=5)
    return len(psutil.Process().children(recursive=True))


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
