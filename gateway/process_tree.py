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


def die_with_parent() -> None:
    """For the child between fork and exec: be terminated when the parent dies. Linux only."""
    if sys.platform == "linux":
        _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl failed")


def end_descendants(*, grace_s: float, report: Callable[[str], None]) -> int:
    """Terminate, then kill, every process below this one; returns how many there were."""
    processes = psutil.Process().children(recursive=True)
    for process in processes:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=grace_s)
    for process in alive:
        report(f"killing {process.pid}, which did not stop")
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=5)
    return len(processes)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
