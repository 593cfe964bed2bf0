"""When and where a running cluster's experts move, from the hosts' records over time. Pure.

``deployments.placement`` says which single move is worth making; this module says what is true now
and when to ask. One move at a time in the whole cluster, a pause after each. A move that was
refused or failed is not tried again for a while, twice as long each time. A host that is gone is
forgotten with all it held; one whose record has stopped changing neither takes nor gives. A host
whose pool already holds all that it may serve has nothing to gain; if all are such, nothing is
computed.

Every engine of a host has a part of its pool and takes experts of one architecture, so a "room" in
the sense of ``placement`` is such a part. Within a group sizes are equal up to the engines' number
formats; memory is counted in the group's largest entry, which makes the number of places exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from deployments.expert_load import ExpertLoads
from deployments.host_record import HostRecord, PoolRecord
from deployments.placement import (
    ExpertNeed,
    HostRoom,
    Move,
    MoveKind,
    Placement,
    PlacementConfig,
    next_move,
)

__all__ = ["MoveOutcome", "PlacementPlanner", "PlannerConfig", "Question"]

_IDLE_YIELDS = PlacementConfig(idle_yields=True)
_LOAD_MIN = 0.01  # slots; what is used less is not worth reading a disk for a second copy
_RECORD_LAG_MS = 500.0  # heartbeat and listing together, with room to spare


class MoveOutcome(StrEnum):
    DONE = "done"
    REFUSED = "refused"  # the host had a reason against it; nothing changed
    FAILED = "failed"  # no answer, or an error; what changed, the next record says
    LEFT = "left"  # nobody waited for the answer any more; the host goes on


@dataclass(frozen=True, slots=True)
class PlannerConfig:
    """``half_life_ms``: how long ago demand counts half. ``pause_ms``: between moves.
    ``silent_ms``: without a new record a host counts as silent. ``refused_ms``, ``failed_ms``: how
    long a move is not repeated the first time; it doubles, up to ``backoff_ms_max``.
    """

    half_life_ms: float = 60_000.0
    pause_ms: float = 5_000.0
    silent_ms: float = 2_000.0
    refused_ms: float = 10_000.0
    failed_ms: float = 30_000.0
    backoff_ms_max: float = 600_000.0
    placement: PlacementConfig = _IDLE_YIELDS

    def __post_init__(self) -> None:
        if self.half_life_ms <= 0 or self.pause_ms < _RECORD_LAG_MS:
            raise ValueError(f"half_life_ms={self.half_life_ms}, pause_ms={self.pause_ms}")

    @property
    def warm_up_ms(self) -> float:
        """How long demand is watched before the first move."""
        return self.half_life_ms / 2


@dataclass(frozen=True, slots=True)
class Question:
    """All that ``next_move`` needs. Answering takes up to tens of milliseconds on a large cluster
    and reads nothing else, so it can be done in a thread. ``host_of``: room -> host.
    """

    needs: Sequence[ExpertNeed]
    rooms: Sequence[HostRoom]
    placement: Placement
    pinned: frozenset[tuple[str, str]]
    config: PlacementConfig
    host_of: Mapping[str, str]

    def answer(self) -> Move | None:
        """The move to make, with the host's own id; None: all is as it should be."""
        move = next_move(self.needs, self.rooms, self.placement, self.config, self.pinned)
        return None if move is None else Move(move.kind, self.host_of[move.host_id], move.expert)


@dataclass(frozen=True, slots=True)
class _Setback:
    times: int
    until_ms: float


@dataclass(frozen=True, slots=True)
class _Room:
    id: str
    record: HostRecord
    pool: PoolRecord
    takes: frozenset[str]  # nobody, where the host is silent; then nobody has to go either


class PlacementPlanner:
    """Single owner of what one gateway worker knows about placement. ``now_ms`` is monotonic."""

    def __init__(self, config: PlannerConfig) -> None:
        self._config = config
        self._loads = ExpertLoads(config.half_life_ms)
        self._records: tuple[HostRecord, ...] = ()
        self._seen: dict[str, tuple[int, float]] = {}  # host -> heartbeat, when it was new here
        self._watching_since_ms: float | None = None
        self._not_before_ms = -math.inf
        self._awaited: tuple[str, float] | None = None  # host, record newer than
        self._setbacks: dict[Move, _Setback] = {}
        self.moving: Move | None = None

    def observe(self, records: Iterable[HostRecord], now_ms: float) -> None:
        """Take in the hosts known now. Every worker does, so that any can take over at once."""
        if self._watching_since_ms is None:
            self._watching_since_ms = now_ms
        self._records = tuple(records)
        self._loads.observe(self._records, now_ms)
        self._seen = {
            record.host_id: self._seen[record.host_id]
            if self._seen.get(record.host_id, (None,))[0] == record.heartbeat_ms
            else (record.heartbeat_ms, now_ms)
            for record in self._records
        }
        self._setbacks = {m: s for m, s in self._setbacks.items() if m.host_id in self._seen}

    def load(self, expert: str) -> float:
        """Slots that the expert keeps busy."""
        return self._loads.load(expert)

    def question(self, now_ms: float) -> Question | None:
        """What to ask now; None: nothing may move, or nothing could."""
        if not self._may_move(now_ms):
            return None
        rooms = [room for record in self._records for room in self._rooms(record, now_ms)]
        if all(room.takes <= set(room.pool.pooled) for room in rooms):
            return None
        return self._question(rooms, now_ms)

    def at_rest(self, now_ms: float) -> None:
        """The answer was that nothing is worth a move: ask again after a pause."""
        self._not_before_ms = now_ms + self._config.pause_ms

    def begin(self, move: Move) -> None:
        """The move is being carried out; ``end`` has to follow."""
        assert self.moving is None, "one move at a time"
        self.moving = move

    def end(self, move: Move, outcome: MoveOutcome, now_ms: float) -> None:
        """How it went. The next question waits for the pause and for the host's new record."""
        assert self.moving == move, "it was not begun"
        self.moving = None
        self._not_before_ms = now_ms + self._config.pause_ms
        self._awaited = (move.host_id, now_ms + _RECORD_LAG_MS)
        if outcome is MoveOutcome.DONE:
            self._setbacks.pop(move, None)
        if outcome in (MoveOutcome.DONE, MoveOutcome.LEFT):
            return
        refused = outcome is MoveOutcome.REFUSED
        first_ms = self._config.refused_ms if refused else self._config.failed_ms
        before = self._setbacks.get(move)
        times = 0 if before is None else before.times
        wait_ms = min(self._config.backoff_ms_max, first_ms * 2.0 ** min(times, 32))
        self._setbacks[move] = _Setback(times + 1, now_ms + wait_ms)

    # --- whether ---------------------------------------------------------------------------------

    def _may_move(self, now_ms: float) -> bool:
        since_ms = self._watching_since_ms
        if since_ms is None or now_ms < since_ms + self._config.warm_up_ms:
            return False
        under_way = self.moving is not None or any(record.moving for record in self._records)
        return not under_way and now_ms >= self._not_before_ms and not self._awaits_a_record()

    def _awaits_a_record(self) -> bool:
        """Whether the host of the last move has not told yet what became of it."""
        if self._awaited is None:
            return False
        host_id, newer_than_ms = self._awaited
        seen = self._seen.get(host_id)
        if seen is None or seen[1] >= newer_than_ms:
            self._awaited = None
        return self._awaited is not None

    # --- what ------------------------------------------------------------------------------------

    def _rooms(self, record: HostRecord, now_ms: float) -> list[_Room]:
        silent = now_ms - self._seen[record.host_id][1] > self._config.silent_ms
        return [
            _Room(
                id=f"{record.host_id} {pool.group}",
                record=record,
                pool=pool,
                takes=frozenset() if silent else self._takes(record, pool, now_ms),
            )
            for pool in record.pools
            if pool.entry_bytes > 0
        ]

    def _takes(self, record: HostRecord, pool: PoolRecord, now_ms: float) -> frozenset[str]:
        return frozenset(
            expert
            for expert in pool.experts
            if record.serves(expert)
            and not self._set_back(Move(MoveKind.POOL, record.host_id, expert), now_ms)
        )

    def _set_back(self, move: Move, now_ms: float) -> bool:
        setback = self._setbacks.get(move)
        return setback is not None and now_ms < setback.until_ms

    def _question(self, rooms: Sequence[_Room], now_ms: float) -> Question:
        unit_bytes: dict[str, int] = {}
        group_of: dict[str, str] = {}
        for room in rooms:
            pool = room.pool
            unit_bytes[pool.group] = max(unit_bytes.get(pool.group, 0), pool.entry_bytes)
            for expert in (*pool.experts, *pool.pooled):
                group_of.setdefault(expert, pool.group)
        return Question(
            needs=[
                ExpertNeed(expert, unit_bytes[group], group, self._worthwhile_load(expert))
                for expert, group in sorted(group_of.items())
            ],
            rooms=[
                HostRoom(
                    room.id,
                    room.pool.limit_bytes // room.pool.entry_bytes * unit_bytes[room.pool.group],
                    room.record.slots,
                    room.pool.group,
                    room.takes,
                )
                for room in rooms
            ],
            placement={room.id: frozenset(room.pool.pooled) for room in rooms},
            pinned=frozenset(
                (room.id, expert)
                for room in rooms
                for expert in room.pool.pooled
                if self._is_pinned(room, expert, now_ms)
            ),
            config=self._config.placement,
            host_of={room.id: room.record.host_id for room in rooms},
        )

    def _worthwhile_load(self, expert: str) -> float:
        load = self._loads.load(expert)
        return load if load >= _LOAD_MIN else 0.0

    def _is_pinned(self, room: _Room, expert: str, now_ms: float) -> bool:
        record = room.record
        return (
            record.resident == expert
            or record.queue_depths.get(expert, 0) > 0
            or self._set_back(Move(MoveKind.EVICT, record.host_id, expert), now_ms)
        )
