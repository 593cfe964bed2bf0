"""Feedback in the store: one atomic script counts a score; a copy of what it taught is kept here.

The copy is refreshed in the background, so that drawing an expert never waits for the store.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from enum import StrEnum
from typing import Any

import msgspec

from deployments.store import Argument, StateStore, load_script
from experts.errors import StateUnavailable
from gateway.feedback import Beta, Feedback

__all__ = ["FeedbackStore", "Given"]

log = logging.getLogger(__name__)

EVIDENCE_MAX = 1_000.0  # per category and expert
LOG_KEPT = 100_000
_PAGE = 1_000
_REFRESH_S = 5.0
_SCRIPT = "give_feedback"
_DECODER = msgspec.json.Decoder(dict[str, Any])


class Given(StrEnum):
    """What became of a score."""

    COUNTED = "counted"
    CHANGED = "changed"  # it replaced an earlier one
    SAME = "same"  # said before: nothing changed
    UNANSWERED = "unanswered"  # no expert answered that request
    UNKNOWN = "unknown"


class FeedbackStore:
    """Counts scores, tells what they taught, reads them back for training."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._known: dict[str, dict[str, Beta]] = {}
        self._task: asyncio.Task[None] | None = None
        store.add_script(_SCRIPT, load_script("gateway.state", f"{_SCRIPT}.lua"))

    async def give(self, feedback: Feedback, key_id: str | None) -> Given:
        """Count a score for a decision of the same key. Raises StateUnavailable."""
        keys = [self._store.key("decisions"), self._store.key("decisions", "ids")]
        keys += [self._store.key("feedback", part) for part in ("given", "posteriors", "log")]
        arguments: list[Argument] = [
            feedback.decision_id,
            key_id or "",
            feedback.score,
            EVIDENCE_MAX,
            LOG_KEPT,
        ]
        reply = await self._store.eval_script(_SCRIPT, keys, arguments)
        return Given(reply.decode())

    def posteriors(self, category: str) -> Mapping[str, Beta]:
        """Expert -> what is known of it in this category, as of the last refresh."""
        return self._known.get(category, {})

    async def refresh(self) -> None:
        """Raises StateUnavailable."""
        stored = await self._store.command("HGETALL", self._store.key("feedback", "posteriors"))
        known: dict[str, dict[str, Beta]] = {}
        for name, value in stored.items():
            category, _, expert = name.decode().rpartition(" ")
            good, bad = map(float, value.decode().split())
            known.setdefault(category, {})[expert] = Beta(1.0 + good, 1.0 + bad)
        self._known = known

    async def records(self) -> AsyncIterator[dict[str, Any]]:
        """All feedback that is kept, oldest first. Raises StateUnavailable."""
        start = "-"
        while True:
            page = await self._store.command(
                "XRANGE", self._store.key("feedback", "log"), start, "+", "COUNT", _PAGE
            )
            for _entry, fields in page:
                yield _DECODER.decode(fields[b"record"])
            if len(page) < _PAGE:
                return
            start = f"({page[-1][0].decode()}"

    def start(self) -> None:
        """Begin to refresh."""
        if self._task is None:
            self._task = asyncio.create_task(self._refresh_forever(), name="feedback")

    async def aclose(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _refresh_forever(self) -> None:
        while True:
            try:
                await self.refresh()
            except StateUnavailable:
                log.debug("feedback is not refreshed: the store is away")
            except Exception:  # outermost frame of the task
                log.exception("refreshing feedback failed")
            await asyncio.sleep(_REFRESH_S)
