"""Moves experts between disk and hosts' memory while the gateway serves: the shell of the planner.

Every worker watches the hosts; the one that holds the lease in the store acts. While the store is
away, or the list of hosts is stale, nothing is begun. What is decided, and when, is
``deployments.placement_planner``'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from deployments.host_record import HostRecord
from deployments.placement import Move
from deployments.placement_planner import MoveOutcome, PlacementPlanner
from experts.errors import StateUnavailable
from gateway.placement_client import MoveAnswer
from gateway.state.moves import MoveRecord

__all__ = ["PlacementTask"]

log = logging.getLogger(__name__)

TICK_S = 1.0


class Lease(Protocol):
    """``deployments.lease.StoreLease`` is one."""

    @property
    def held(self) -> bool: ...

    async def hold(self) -> bool: ...

    async def release(self) -> None: ...


class Hosts(Protocol):
    """``deployments.host_directory.HostDirectory`` is one."""

    @property
    def stale(self) -> bool: ...

    @property
    def records(self) -> Sequence[HostRecord]: ...


class Commands(Protocol):
    """``gateway.placement_client.HostCommands`` is one."""

    async def move(self, url: str, move: Move) -> MoveAnswer: ...


class Moves(Protocol):
    """``gateway.state.moves.MoveLog`` is one."""

    async def append(self, move: MoveRecord) -> None: ...


class PlacementTask:
    """``count(kind, outcome)`` counts moves. ``now_ms``: monotonic; ``wall_ms``: since 1970."""

    def __init__(
        self,
        planner: PlacementPlanner,
        lease: Lease,
        *,
        hosts: Hosts,
        commands: Commands,
        moves: Moves,
        count: Callable[[str, str], None],
        now_ms: Callable[[], float],
        wall_ms: Callable[[], int],
    ) -> None:
        self._planner = planner
        self._lease = lease
        self._hosts = hosts
        self._commands = commands
        self._moves = moves
        self._count = count
        self._now_ms = now_ms
        self._wall_ms = wall_ms
        self._task: asyncio.Task[None] | None = None
        self._move: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="placement")

    async def aclose(self) -> None:
        """Stop watching and give the lease back. A host goes on with a move that it has begun; its
        record says so, and whoever has the lease next waits for it."""
        running = [task for task in (self._task, self._move) if task is not None]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if self._lease.held:
            with contextlib.suppress(StateUnavailable):  # then it ends by itself
                await self._lease.release()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self.tick()
            except Exception:  # outermost frame of the task; one fault must not end placement
                log.exception("deciding on placement failed")

    async def tick(self) -> None:
        """Look at the hosts once, and begin the next move if it is time and ours to do."""
        if self._hosts.stale:
            return
        self._planner.observe(self._hosts.records, self._now_ms())
        try:
            if not await self._lease.hold():
                return
        except StateUnavailable:
            return
        question = self._planner.question(self._now_ms())
        if question is None:
            return
        move = await asyncio.to_thread(question.answer)
        if move is None:
            self._planner.at_rest(self._now_ms())
        elif self._lease.held and (url := self._url_of(move.host_id)) is not None:
            self._planner.begin(move)
            self._move = asyncio.create_task(self._carry_out(url, move), name="placement move")

    def _url_of(self, host_id: str) -> str | None:
        """None: the host has gone since."""
        return next((r.url for r in self._hosts.records if r.host_id == host_id), None)

    async def _carry_out(self, url: str, move: Move) -> None:
        began_ms = self._now_ms()
        try:
            answer = await self._commands.move(url, move)
        except asyncio.CancelledError:
            self._ended(move, MoveAnswer(MoveOutcome.LEFT, "this worker ends"), began_ms)
            raise
        except BaseException:
            self._ended(move, MoveAnswer(MoveOutcome.FAILED, "a defect here"), began_ms)
            raise
        record = self._ended(move, answer, began_ms)
        with contextlib.suppress(StateUnavailable):  # the log line and the counter have it
            await self._moves.append(record)

    def _ended(self, move: Move, answer: MoveAnswer, began_ms: float) -> MoveRecord:
        ended_ms = self._now_ms()
        self._planner.end(move, answer.outcome, ended_ms)
        self._count(move.kind.value, answer.outcome.value)
        record = MoveRecord(
            ended_ms=self._wall_ms(),
            kind=move.kind.value,
            host=move.host_id,
            expert=move.expert,
            outcome=answer.outcome.value,
            reason=answer.reason,
            took_ms=round(ended_ms - began_ms, 1),
        )
        _tell(record, self._planner.load(move.expert))
        return record


def _tell(record: MoveRecord, load: float) -> None:
    well = record.outcome in (MoveOutcome.DONE, MoveOutcome.LEFT)
    level = logging.INFO if well else logging.WARNING
    fields = {**msgspec.to_builtins(record), "load": round(load, 3)}
    log.log(level, "placement move", extra={"fields": fields})
