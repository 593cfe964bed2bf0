"""Micro-batching on one worker thread: what waits while it works becomes the next batch."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Final, Generic, TypeVar

from experts.errors import QueueFull

__all__ = ["MicroBatcher"]

Item = TypeVar("Item")
Answer = TypeVar("Answer")

_SMOOTHING: Final = 0.2  # weight of the newest batch in the mean time per item


class MicroBatcher(Generic[Item, Answer]):
    """Runs ``work(items) -> answers`` off the event loop, at most one batch at a time.

    A lone item starts at once. Several that arrive together wait up to ``max_wait_ms`` for more,
    or until ``max_batch`` are there. All state belongs to the event loop's thread; the worker sees
    only the items it is given.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Answer]],
        *,
        name: str,
        max_batch: int,
        max_wait_ms: float,
        queue_max: int,
    ) -> None:
        if min(max_batch, queue_max) < 1 or max_wait_ms < 0:
            raise ValueError("max_batch and queue_max must be positive, max_wait_ms not negative")
        self._work = work
        self._name = name
        self._max_batch = max_batch
        self._max_wait_s = max_wait_ms / 1000
        self._queue_max = queue_max
        self._queue: dict[asyncio.Future[Answer], Item] = {}
        self._start_timer: asyncio.Handle | None = None
        self._busy = False
        self._closed = False
        self._item_ms = 0.0
        self._at_rest = asyncio.Event()
        self._at_rest.set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    def submit(self, item: Item) -> asyncio.Future[Answer]:
        """Queue one item. Cancelling the future takes it out of the queue.

        Raises QueueFull at the bound, RuntimeError after ``aclose``.
        """
        if self._closed:
            raise RuntimeError(f"{self._name} is closed")
        if len(self._queue) >= self._queue_max:
            raise QueueFull(self._name, self._queue_max, self._item_ms * self._queue_max)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._queue[future] = item
        self._at_rest.clear()
        future.add_done_callback(self._forget)
        self._schedule(loop)
        return future

    async def aclose(self) -> None:
        """Refuse new items, finish the accepted ones, end the thread."""
        self._closed = True
        if self._start_timer is not None:  # nobody else can come, so there is nothing to wait for
            self._start_timer.cancel()
            self._start()
        try:
            await self._at_rest.wait()
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _schedule(self, loop: asyncio.AbstractEventLoop) -> None:
        """From rest, let every task that is ready now submit first; a full batch waits no more."""
        if self._busy:
            return
        if self._start_timer is None:
            self._start_timer = loop.call_soon(self._start_or_gather)
        elif len(self._queue) >= self._max_batch:
            self._start_timer.cancel()
            self._start_timer = loop.call_soon(self._start)

    def _start_or_gather(self) -> None:
        if 1 < len(self._queue) < self._max_batch and self._max_wait_s > 0:
            loop = asyncio.get_running_loop()
            self._start_timer = loop.call_later(self._max_wait_s, self._start)
        else:
            self._start()

    def _start(self) -> None:
        self._start_timer = None
        batch = list(islice(self._queue.items(), self._max_batch))
        if not batch:
            self._at_rest.set()
            return
        for future, _ in batch:
            del self._queue[future]
        self._busy = True
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._thread, self._work, [item for _, item in batch])
        futures = [future for future, _ in batch]
        running.add_done_callback(partial(self._finish, futures, loop.time()))

    def _finish(
        self,
        waiting: Sequence[asyncio.Future[Answer]],
        started_s: float,
        ran: asyncio.Future[Sequence[Answer]],
    ) -> None:
        self._busy = False
        if ran.cancelled():
            for future in waiting:
                future.cancel()
        elif error := ran.exception():
            for future in waiting:
                if not future.done():
                    future.set_exception(error)
        else:
            for future, answer in zip(waiting, ran.result(), strict=True):
                if not future.done():
                    future.set_result(answer)
        took_ms = (asyncio.get_running_loop().time() - started_s) * 1000 / len(waiting)
        self._item_ms += (took_ms - self._item_ms) * (_SMOOTHING if self._item_ms else 1.0)
        self._start()

    def _forget(self, future: asyncio.Future[Answer]) -> None:
        """A cancelled future frees its place at once."""
        self._queue.pop(future, None)
