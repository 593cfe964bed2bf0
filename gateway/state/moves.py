"""The last changes of placement, in the store, so that every worker can show them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from deployments.store import StateStore, load_script

__all__ = ["MOVES_KEPT", "MoveLog", "MoveRecord"]

MOVES_KEPT = 50
_SCRIPT = "append_move"


@dataclass(frozen=True, slots=True)
class MoveRecord:
    """``kind``: pool or evict. ``outcome``: done, refused or failed, with the ``reason``.
    ``ended_ms``: milliseconds since the epoch.
    """

    ended_ms: int
    kind: str
    host: str
    expert: str
    outcome: str
    reason: str
    took_ms: float


class MoveLog:
    """Both methods raise StateUnavailable."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._key = store.key("placement", "moves")
        store.add_script(_SCRIPT, load_script("gateway.state", f"{_SCRIPT}.lua"))

    async def append(self, move: MoveRecord) -> None:
        await self._store.eval_script(_SCRIPT, [self._key], [msgspec.json.encode(move), MOVES_KEPT])

    async def last(self) -> list[dict[str, Any]]:
        """The newest first, as JSON-ready builtins."""
        stored = await self._store.command("LRANGE", self._key, 0, MOVES_KEPT - 1)
        return [msgspec.json.decode(raw) for raw in stored]
