"""Who answered last in each conversation: in the store, with a time to live, and a copy here.

Remembering never waits: entries are written in the background, many at once. Recalling costs one
round trip, and only for a request that continues a conversation. While the store is away, what this
worker itself has seen is recalled.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from typing import TypeVar

import msgspec

from deployments.store import Argument, StateStore, load_script
from experts.errors import StateUnavailable
from gateway.affinity import Session
from gateway.journal import Journal

__all__ = ["SessionMemory"]

log = logging.getLogger(__name__)

LOCAL_MAX = 10_000
_BATCH = 64
_GAP_S = 0.01
T = TypeVar("T")
_DECODER = msgspec.json.Decoder(Session)


class SessionMemory:
    """One worker's view of the sessions. ``store`` None: only what this worker has seen."""

    def __init__(self, store: StateStore | None = None) -> None:
        self._store = store
        self._seen: OrderedDict[str, Session] = OrderedDict()
        self._unwritten: OrderedDict[str, tuple[Session, int]] = OrderedDict()
        self._filled = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        if store is not None:
            text = load_script("gateway.state", "remember_sessions.lua")
            store.add_script("remember_sessions", text)

    @property
    def held(self) -> int:
        """Sessions held in this process."""
        return len(self._seen)

    async def recall(self, key: str) -> Session | None:
        if self._store is None:
            return self._seen.get(key)
        if (unwritten := self._unwritten.get(key)) is not None:
            return unwritten[0]
        try:
            stored = await self._store.command("GET", self._store.key("session", key))
        except StateUnavailable:
            return self._seen.get(key)
        return None if stored is None else _DECODER.decode(stored)

    def remember(self, key: str, session: Session, ttl_ms: int) -> None:
        """Never waits; beyond ``LOCAL_MAX`` the longest unused is forgotten here."""
        _put(self._seen, key, session)
        if self._store is not None:
            _put(self._unwritten, key, (session, ttl_ms))
            self._filled.set()

    def observe(self, journal: Journal) -> None:
        """Remember what a finished request tells. A failed one says nothing of its expert."""
        decision, served = journal.decision, journal.served
        if journal.conversation is None or decision is None or served is None:
            return
        if journal.outcome == "ok" and decision.affinity_ttl_ms:
            tokens = served.usage.input_tokens + served.usage.output_tokens
            session = Session(served.expert, decision.plan.category, tokens)
            self.remember(journal.conversation.key, session, decision.affinity_ttl_ms)

    def start(self) -> None:
        if self._task is None and self._store is not None:
            self._task = asyncio.create_task(self._write_forever(), name="sessions")

    async def aclose(self) -> None:
        """Write what waits, if the store takes it at once."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        try:
            await self.flush()
        except StateUnavailable:
            log.info("%d sessions were not written", len(self._unwritten))

    async def flush(self) -> None:
        """Raises StateUnavailable; what was not written is kept only in this process."""
        while self._unwritten and self._store is not None:
            count = min(_BATCH, len(self._unwritten))
            batch = [self._unwritten.popitem(last=False) for _ in range(count)]
            arguments: list[Argument] = []
            for _, (session, ttl_ms) in batch:
                arguments += [msgspec.json.encode(session), ttl_ms]
            keys = [self._store.key("session", key) for key, _ in batch]
            await self._store.eval_script("remember_sessions", keys, arguments)

    async def _write_forever(self) -> None:
        while True:
            await self._filled.wait()
            self._filled.clear()
            try:
                await self.flush()
            except StateUnavailable:
                self._unwritten.clear()  # a convenience, not worth a queue
            except Exception:  # outermost frame of the task
                log.exception("writing sessions failed")
            await asyncio.sleep(_GAP_S)


def _put(table: OrderedDict[str, T], key: str, value: T) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > LOCAL_MAX:
        table.popitem(last=False)
