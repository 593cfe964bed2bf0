"""Keys looked up a moment ago, so that a busy key costs the store two round trips, not three.

What is remembered decides nothing that is charged: admission reads the key anew, in the script that
takes from its limits, and refuses one that was revoked meanwhile. Only what uses nothing up (the
model list, ``/v1/route``, counting tokens) can be a second behind. A digest that nobody knows is
never remembered: a key works from the moment it is made, and guesses fill no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from gateway.keys import KeyRecord

__all__ = ["KeyLookup", "RecentKeys"]

TTL_MS: Final = 1_000.0
KEYS_MAX: Final = 10_000


class KeyLookup(Protocol):
    """Finds a key by the digest of its secret; ``gateway.state.keys.KeyStore`` is one."""

    async def find(self, digest: str) -> KeyRecord | None: ...


class RecentKeys:
    """A ``KeyLookup`` before another one. Remembers ``KEYS_MAX`` valid keys for ``TTL_MS`` each."""

    def __init__(self, keys: KeyLookup, now_ms: Callable[[], float]) -> None:
        self._keys = keys
        self._now_ms = now_ms
        self._until_ms: dict[str, tuple[float, KeyRecord]] = {}  # in order of their ends

    async def find(self, digest: str) -> KeyRecord | None:
        """The key with this digest. Raises what the other one raises."""
        kept = self._until_ms.get(digest)
        if kept is not None and self._now_ms() < kept[0]:
            return kept[1]
        asked_ms = self._now_ms()  # not the reply's time: it was true when the store was asked
        record = await self._keys.find(digest)
        self._until_ms.pop(digest, None)
        if record is not None and record.revoked_ms is None:
            self._remember(digest, record, asked_ms + TTL_MS)
        return record

    def _remember(self, digest: str, record: KeyRecord, until_ms: float) -> None:
        while self._until_ms:
            oldest = next(iter(self._until_ms))
            if len(self._until_ms) < KEYS_MAX and self._until_ms[oldest][0] > self._now_ms():
                break
            del self._until_ms[oldest]
        self._until_ms[digest] = (until_ms, record)
