"""``POST /placement`` on a host's own port: take an expert's weights in, or let go of them.

``{"kind": "pool", "expert": "sql"}`` answers when the weights are in host memory, ``"evict"`` when
their memory is free. Both are idempotent: what is so already is answered at once. What stands
against it now (the expert is resident, waited for, about to be; no free room; another load) is a
409 with the reason, and nothing has changed then. An evicted expert can still be asked for here;
it is read from disk again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from deployments.placement import MoveKind
from deployments.swap.loading import WeightLoading
from experts.errors import InvalidRequest, UnknownModel

__all__ = ["PLACEMENT_PATH", "PlacementCommands"]

log = logging.getLogger(__name__)

PLACEMENT_PATH = "/placement"
_FIELDS = ("kind", "expert")


class PlacementCommands:
    """Carries commands out. ``experts``: all that this host may hold. ``clock`` tells ms."""

    def __init__(
        self,
        loading: WeightLoading,
        experts: tuple[str, ...],
        clock: Callable[[], float] = lambda: time.monotonic() * 1000,
    ) -> None:
        self._loading = loading
        self._experts = experts
        self._clock = clock

    async def carry_out(self, body: dict[str, Any]) -> dict[str, Any]:
        """Raises InvalidRequest naming the field, UnknownModel, PlacementRefused,
        ExpertOutOfService and HostUnavailable."""
        kind, expert = self._parse(body)
        began_ms = self._clock()
        if kind is MoveKind.POOL:
            await self._loading.pool(expert)
        else:
            await self._loading.evict(expert)
        took_ms = round(self._clock() - began_ms, 1)
        log.info("placement changed", extra={"kind": kind, "expert": expert, "took_ms": took_ms})
        return {"kind": kind, "expert": expert, "took_ms": took_ms}

    def _parse(self, body: dict[str, Any]) -> tuple[MoveKind, str]:
        for name in sorted(body.keys() - set(_FIELDS)):
            raise InvalidRequest(name, "unknown field; expected kind and expert")
        for name in _FIELDS:
            if not isinstance(body.get(name), str):
                raise InvalidRequest(name, "required, as text")
        try:
            kind = MoveKind(body["kind"])
        except ValueError:
            raise InvalidRequest("kind", "must be 'pool' or 'evict'") from None
        if body["expert"] not in self._experts:
            raise UnknownModel(body["expert"], self._experts)
        return kind, body["expert"]
