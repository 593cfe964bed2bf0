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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType

from deployments.choose_host import idle_host_for
from deployments.host_record import HostRecord

__all__ = ["MovedElsewhere", "WaitingCalls"]

log = logging.getLogger(__name__)


class MovedElsewhere(Exception):
    """The call was taken back from its host, for it to be sent to another. Never leaves the stage.

    Not an error of any expert, and therefore none of ``experts.errors``.
    """


class _Wait:
    """One call from when it is sent until something of its answer is there, as a context.

    ``take_back`` cancels what runs inside, which then ends with MovedElsewhere. A cancellation
    from elsewhere, also one at the same time, stays what it is: the accounting of
    ``asyncio.timeout``, without its timer.
    """

    __slots__ = ("_calls", "_cancelling", "_taken", "_task", "place")

    def __init__(self, calls: dict[_Wait, None], place: tuple[str, str]) -> None:
        self._calls = calls
        self.place = place
        self._taken = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "a coroutine always runs in a task under asyncio"
        self._task = task
        self._cancelling = task.cancelling()
        self._calls[self] = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        del self._calls[self]
        if not self._taken:
            return
        others = self._task.uncancel() > self._cancelling
        if kind is asyncio.CancelledError and not others:
            raise MovedElsewhere from error

    def take_back(self) -> None:
        if not self._taken:
            self._taken = True
            self._task.cancel()


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
        self._calls: dict[_Wait, None] = {}  # oldest first

    def waiting(self, host: str, expert: str) -> AbstractContextManager[None]:
        """Holds a call from when it is sent until something of its answer is there.

        Raises MovedElsewhere, with the call cancelled, when it should go to another host.
        """
        return _Wait(self._calls, (host, expert))

    def look(self) -> None:
        """Take back what would be served sooner elsewhere; to be called when hosts were listed.

        Calls for one expert at one host move together, for it is one swap that serves all of them,
        and one host takes the calls for one expert.
        """
        waiting: dict[tuple[str, str], list[_Wait]] = {}
        for call in self._calls:
            waiting.setdefault(call.place, []).append(call)
        taken: set[str] = set()
        for (host, expert), calls in waiting.items():
            records = [r for r in self._records(expert) if r.host_id not in taken]
            idle = idle_host_for(records, host, expert, self._wall_ms())
            if idle is None:
                continue
            taken.add(idle.host_id)
            log.info(
                "calls go to a host that has fallen idle",
                extra={"expert": expert, "from_host": host, "calls": len(calls)},
            )
            for call in calls:
                call.take_back()
