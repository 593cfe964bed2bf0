"""The decision log: why each request went where it went, for operators and for later training.

``DecisionLog.append`` never waits: it puts the record into a bounded queue, and a task writes the
queue to the store. When the store is away the queue fills, then the oldest records are dropped and
counted. What a record holds is ``gateway.journal.decision_record``'s to say; no prompt is in it.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from collections.abc import Mapping
from typing import Any

import msgspec

from deployments.store import StateStore, load_script
from experts.errors import StateUnavailable

log = logging.getLogger(__name__)

TAIL_MAX = 1_000
_BATCH = 64
_RETRY_S = 0.5
_ENTRY_ID = re.compile(r"\d{1,20}-\d{1,20}")
_DECODER = msgspec.json.Decoder(dict[str, Any])


class DecisionLog:
    """Writes to and reads from one stream of about ``keep_records`` records.

    ``queue_records`` bounds what waits in this process. A write whose answer was lost is made
    again, so the stream may hold a record twice; ``tail`` shows it once.
    """

    def __init__(
        self, store: StateStore, *, keep_records: int = 10_000, queue_records: int = 1_000
    ) -> None:
        self._store = store
        self._key = store.key("decisions")
        self._keys = [self._key, store.key("decisions", "ids"), store.key("feedback", "given")]
        self._keep_records = keep_records
        self._queue: deque[bytes] = deque()
        self._queue_records = queue_records
        self._writing = 0
        self._dropped = 0
        self._filled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        store.add_script("append_decisions", load_script("gateway.state", "append_decisions.lua"))

    @property
    def dropped(self) -> int:
        """Records lost since the start because the queue was full."""
        return self._dropped

    @property
    def queued(self) -> int:
        """Records not yet known to be written."""
        return len(self._queue) + self._writing

    def append(self, record: Mapping[str, Any], /) -> None:
        """Queue one record; drops the oldest when the queue is full. Never waits.

        ``record`` is JSON-ready and has a ``decision_id``.
        """
        if "decision_id" not in record:
            raise ValueError("a decision record needs a decision_id")
        if len(self._queue) >= self._queue_records:
            self._queue.popleft()
            self._dropped += 1
        self._queue.append(msgspec.json.encode(record))
        self._filled.set()

    def start(self) -> None:
        """Begin writing in the background."""
        if self._task is None:
            self._task = asyncio.create_task(self._write_forever(), name="decision-log")

    async def aclose(self, flush_ms: float = 1_000) -> None:
        """Write what waits, for at most ``flush_ms``, and stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        try:
            async with asyncio.timeout(flush_ms / 1000):
                await self.flush()
        except (StateUnavailable, TimeoutError):
            log.warning("%d decision records were not written", len(self._queue))

    async def flush(self) -> None:
        """Write all that waits now. Raises StateUnavailable; what was not written stays queued."""
        while self._queue:
            await self._write_batch()

    async def tail(self, n: int) -> list[dict[str, Any]]:
        """The last ``n`` records (``TAIL_MAX`` at most), newest first. Raises StateUnavailable."""
        entries = await self._store.command(
            "XREVRANGE", self._key, "+", "-", "COUNT", max(1, min(n, TAIL_MAX))
        )
        by_id: dict[str, dict[str, Any]] = {}
        for _entry_id, fields in entries:
            record = _DECODER.decode(fields[b"record"])
            by_id.setdefault(record["decision_id"], record)
        return list(by_id.values())

    async def read_after(self, entry_id: str, n: int) -> tuple[str, list[dict[str, Any]]]:
        """At most ``n`` records after the entry, oldest first, and the id of the last one.

        ``entry_id`` empty: from the oldest that is kept. Raises StateUnavailable, and ValueError
        for what is no id of an entry.
        """
        if entry_id and not _ENTRY_ID.fullmatch(entry_id):
            raise ValueError(f"{entry_id!r} is not an entry of the decision log")
        begin = f"({entry_id}" if entry_id else "-"
        entries = await self._store.command(
            "XRANGE", self._key, begin, "+", "COUNT", max(1, min(n, TAIL_MAX))
        )
        last = entries[-1][0].decode() if entries else entry_id
        return last, [_DECODER.decode(fields[b"record"]) for _entry_id, fields in entries]

    async def last_entry(self) -> str:
        """The newest entry's id; empty for an empty log. Raises StateUnavailable."""
        entries = await self._store.command("XREVRANGE", self._key, "+", "-", "COUNT", 1)
        return entries[0][0].decode() if entries else ""

    async def _write_forever(self) -> None:
        while True:
            await self._filled.wait()
            self._filled.clear()
            try:
                await self.flush()
            except StateUnavailable:
                self._filled.set()
                await asyncio.sleep(_RETRY_S)
            except Exception:  # outermost frame of the task; logging must go on
                log.exception("writing decision records failed")
                await asyncio.sleep(_RETRY_S)

    async def _write_batch(self) -> None:
        batch = [self._queue.popleft() for _ in range(min(_BATCH, len(self._queue)))]
        self._writing += len(batch)
        try:
            await self._store.eval_script(
                "append_decisions", self._keys, [self._keep_records, *batch]
            )
        except BaseException:
            self._put_back(batch)
            raise
        finally:
            self._writing -= len(batch)

    def _put_back(self, batch: list[bytes]) -> None:
        """To the front, dropping the oldest of them for what has been queued meanwhile."""
        room = max(0, self._queue_records - len(self._queue))
        kept = batch[len(batch) - min(room, len(batch)) :]
        self._dropped += len(batch) - len(kept)
        self._queue.extendleft(reversed(kept))
