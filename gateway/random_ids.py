"""Ids of requests and decisions: 128 random bits in hexadecimal, unguessable and never the same.

The system's randomness is asked for many of them at once; a call of the system for each is dearer
than everything else about an id.
"""

from __future__ import annotations

import os

__all__ = ["RandomIds"]

_HEX_DIGITS = 32
_AT_ONCE = 128


class RandomIds:
    """Gives ids that begin with ``prefix``. For one thread of one process: do not fork with it."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._stock = ""
        self._next = 0

    def __call__(self) -> str:
        start = self._next
        if start == len(self._stock):
            self._stock = os.urandom(_AT_ONCE * _HEX_DIGITS // 2).hex()
            start = 0
        self._next = end = start + _HEX_DIGITS
        return self._prefix + self._stock[start:end]
