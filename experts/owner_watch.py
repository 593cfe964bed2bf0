"""An engine's processes end when their owner does, however it ended.

vLLM's engine process has no eye on the process that started it. When that one is killed, the engine
lives on, with the accelerator's memory, and its replacement finds none. So each worker watches, and
takes the processes between itself and the owner along.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil

__all__ = ["OWNER_ENV", "watch_owner"]

OWNER_ENV = "COE_ENGINE_OWNER_PID"
_EVERY_S = 1.0


def watch_owner(owner_pid: int, *, every_s: float = _EVERY_S) -> None:
    """Kill this process, and those between it and ``owner_pid``, soon after the owner has ended.

    Does nothing in a process that is not below the owner.
    """
    chain: list[psutil.Process] = []
    process: psutil.Process | None = psutil.Process()
    while process is not None and process.pid != owner_pid:
        chain.append(process)
        process = process.parent()
    if process is None or not chain:
        return
    # A thread, not the kernel's death signal: that one follows the thread which forked us.
    threading.Thread(
        target=_watch, args=(process, chain, every_s), name="owner-watch", daemon=True
    ).start()


def _watch(owner: psutil.Process, chain: list[psutil.Process], every_s: float) -> None:
    while _lives(owner):
        time.sleep(every_s)
    for process in reversed(chain[1:]):
        try:
            process.kill()  # psutil does not touch another process that got the same number
        except psutil.NoSuchProcess:
            continue
    os.kill(os.getpid(), signal.SIGKILL)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
