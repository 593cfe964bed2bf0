"""Calls that wait at a busy host go to one that has fallen idle since they were sent.

A host is chosen when a request comes, from what is known then. While it waits there for another
expert's work to end, another host may run out of work; it is then taken back and sent again
(late binding, as in Sparrow, SOSP 2013). Taking back is closing the connection, which a host
answers by withdrawing the request from its queue. ``idle_host_for`` moves only calls whose expert
was not resident in the host's newest record, so nothing of them ran then; at worst what ran since,
a fraction of a second, is generated again. A call of which anything has arrived is never moved.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from deployments.choose_host import idle_host_for
from deployments.host_record import HostRecord

__all__ = ["MovedElsewhere", "WaitingCalls"]

log = logging.getLogger(__name__)


class MovedElsewhere(Exception):
    """The call was taken back from its host, for it to be sent to another. Never leaves the stage.

    Not an error of any expert, and therefore none of ``experts.errors``.
    """


class WaitingCalls:
    """Single owner of one gateway worker's calls that have received nothing yet.

    ``records``: the hosts that may be called for an expert, as known now, with what this gateway
    sent since they wrote.
    """

    def __init__(
        self, records: Callable[[str], Sequence[HostRecord]], wall_ms: Callable[[], float]
    ) -> None:
        self._records = records
        self._wall_ms = wall_ms
        self._calls: dict[asyncio.Timeout, tuple[str, str]] = {}  # oldest first

    @asynccontextmanager
    async def waiting(self, host: str, expert: str) -> AsyncIterator[None]:
        """Holds a call from when it is sent until something of its answer is there.

        Raises MovedElsewhere, with the call cancelled, when it should go to another host.
        """
        try:
            # The deadline is what takes it back: set to now when it should move, else never.
            async with asyncio.timeout(None) as deadline:
                self._calls[deadline] = (host, expert)
                try:
                    yield
                finally:
                    del self._calls[deadline]
        except TimeoutError:
            if deadline.expired():
                raise MovedElsewhere from None
            raise

    def look(self) -> None:
        """Take back what would be served sooner elsewhere; to be called when hosts were listed.

        Calls for one expert at one host move together, for it is one swap that serves all of them,
        and one host takes the calls for one expert.
        """
        waiting: dict[tuple[str, str], list[asyncio.Timeout]] = {}
        for deadline, place in self._calls.items():
            waiting.setdefault(place, []).append(deadline)
        taken: set[str] = set()
        now_s = asyncio.get_running_loop().time() if waiting else 0.0
        for (host, expert), deadlines in waiting.items():
            records = [r for r in self._records(expert) if r.host_id not in taken]
            idle = idle_host_for(records, host, expert, self._wall_ms())
            if idle is None:
                continue
            taken.add(idle.host_id)
            log.info(
                "calls go to a host that has fallen idle",
                extra={"expert": expert, "from_host": host, "calls": len(deadlines)},
            )
            for deadline in deadlines:
                deadline.reschedule(now_s)
