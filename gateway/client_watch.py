"""Noticing that the client has left, streamed or not, and cancelling what was done for it."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Receive

__all__ = ["ClientGone", "ClientWatch"]


_GRACE_S = 0.02  # an answer that is there by then never pays for a watching task


class ClientGone(Exception):
    """The client closed the connection; nobody is left to answer."""


class ClientWatch:
    """Cancels the task inside the block when the client leaves, and raises ClientGone there.

    Enter it when the request's body has been read: from then on ``receive`` has only the
    disconnect to tell. A cancellation from elsewhere (shutdown) passes through unchanged. The watch
    begins after a short grace period; who left before that is noticed then.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._gone = False
        self._done = False

    async def __aenter__(self) -> ClientWatch:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None, "a coroutine always runs in a task under asyncio"
        self._task = task
        self._watcher: asyncio.Task[None] | None = None
        self._timer = loop.call_later(_GRACE_S, self._begin)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.disarm()
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        if self._gone and kind is asyncio.CancelledError and self._task.uncancel() == 0:
            raise ClientGone from error

    def disarm(self) -> None:
        """The answer is complete: from now on a disconnect is the normal end."""
        self._done = True

    def _begin(self) -> None:
        self._watcher = asyncio.ensure_future(self._wait())

    async def _wait(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if not self._done:
            self._gone = True
            self._task.cancel()
