"""Become another program that the kernel kills when our parent dies. Linux only.

Run by path as ``python -I -S die_with_parent.py PARENT_PID PROGRAM [ARGUMENT ...]``, so it may
import the standard library only. The death signal survives exec. This is a program of its own,
because code between fork and exec in a process with threads can deadlock (Python's ``preexec_fn``).

The kernel sends the signal when the *thread* that forked us ends, not the process: whoever starts
us must do so from a thread that lives as long as we should.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Arm the death signal, make sure the parent had not died before that, exec the program."""
    parent_pid, program = int(arguments[0]), arguments[1]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        sys.exit("the parent died first")
    os.execv(program, arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
