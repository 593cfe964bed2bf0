"""A lease in the state store: of all processes that want to do something, one does.

It ends by itself when its holder falls silent. Its time is counted from before the store was asked,
by the holder's own monotonic clock, so a holder knows to be one no longer than the store does
(clocks need to run alike, not to agree). A holder that is stalled between looking at ``held`` and
acting can still act late; what is done under a lease must therefore be safe if done twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from deployments.store import StateStore, load_script

__all__ = ["StoreLease"]

_SCRIPTS = ("hold_lease", "release_lease")


class StoreLease:
    """``owner`` must differ between all who want the lease called ``name``."""

    def __init__(
        self,
        store: StateStore,
        name: str,
        *,
        owner: str,
        ttl_ms: int = 5_000,
        clock_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
    ) -> None:
        self._store = store
        self._key = store.key("lease", name)
        self._owner = owner
        self._ttl_ms = ttl_ms
        self._clock_ms = clock_ms
        self._until_ms = -math.inf
        for script in _SCRIPTS:
            store.add_script(script, load_script("deployments", f"lua/{script}.lua"))

    @property
    def held(self) -> bool:
        """Whether the lease is surely ours now."""
        return self._clock_ms() < self._until_ms

    async def hold(self) -> bool:
        """Take it or renew it; whether it is ours. Raises StateUnavailable; what was held before
        runs on until its end then."""
        asked_ms = self._clock_ms()
        ours = await self._store.eval_script("hold_lease", [self._key], [self._owner, self._ttl_ms])
        self._until_ms = asked_ms + self._ttl_ms if ours == 1 else -math.inf
        return self.held

    async def release(self) -> None:
        """Let somebody else have it at once. Raises StateUnavailable; then it ends by itself."""
        self._until_ms = -math.inf
        await self._store.eval_script("release_lease", [self._key], [self._owner])
