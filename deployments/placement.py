"""Which experts' weights each host keeps in memory: pure, one move at a time, while all serve.

A placement is judged by two things, in this order: how much demand has a host at all, and the sum
over hosts of (load / slots)^2 x slots, where an expert's load (slots that it keeps busy: requests
per second x seconds each) is split evenly over its copies. The second is convex, so it falls when a
hot expert gets another copy and when load moves from a busy host to an idle one. It is a potential:
every step that ``next_move`` proposes raises the first or lowers the second by at least
``gain_min`` of it, so under a demand that stays the moves come to an end.

Experts of one architecture run in one engine: a host takes experts of one group only, its own or,
while it holds nothing, any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = [
    "ExpertNeed",
    "HostRoom",
    "Move",
    "MoveKind",
    "Placement",
    "PlacementConfig",
    "apply_move",
    "cost",
    "loads",
    "next_move",
    "settle",
    "unplaced",
]

Placement = Mapping[str, frozenset[str]]
"""Host id to the experts that it holds."""


@dataclass(frozen=True, slots=True)
class ExpertNeed:
    """``group``: what has to be equal for experts to share an engine. ``load``: slots kept busy."""

    expert: str
    size_bytes: int
    group: str
    load: float


@dataclass(frozen=True, slots=True)
class HostRoom:
    """``memory_bytes``: the host's weight pool. ``slots``: engines that serve from it. ``group``:
    of its engine; None while it could still start any. ``takes``: the only experts that may be
    pooled there, whatever is held already; None: any.
    """

    host_id: str
    memory_bytes: int
    slots: int = 1
    group: str | None = None
    takes: frozenset[str] | None = None


class MoveKind(StrEnum):
    POOL = "pool"  # load the expert's weights into the host's memory, then serve it there
    EVICT = "evict"  # stop serving it there, then let go of its weights


@dataclass(frozen=True, slots=True)
class Move:
    kind: MoveKind
    host_id: str
    expert: str


@dataclass(frozen=True, slots=True)
class PlacementConfig:
    """``gain_min``: the share by which a move must lower the cost, or by which an expert's load
    must exceed another's to take its only place. ``copies_max``: of one expert. ``idle_yields``:
    an expert without any load gives its only place up to a copy of one that has some, and gets
    places that nobody else has a use for; otherwise every expert comes before every copy.
    """

    gain_min: float = 0.02
    copies_max: int = 64
    idle_yields: bool = False

    def __post_init__(self) -> None:
        if not 0.0 < self.gain_min < 1.0 or self.copies_max < 1:
            raise ValueError(f"gain_min={self.gain_min}, copies_max={self.copies_max}")


def loads(needs: Iterable[ExpertNeed], placement: Placement) -> dict[str, float]:
    """Host to the load that falls on it: each expert's split evenly over its copies."""
    by_host = dict.fromkeys(placement, 0.0)
    for need in needs:
        holders = [host for host, held in placement.items() if need.expert in held]
        for host in holders:
            by_host[host] += need.load / len(holders)
    return by_host


def cost(needs: Iterable[ExpertNeed], hosts: Iterable[HostRoom], placement: Placement) -> float:
    """The sum over hosts of (load / slots)^2 x slots: how crowded it is where requests go."""
    by_host = loads(needs, placement)
    return sum(by_host[host.host_id] ** 2 / host.slots for host in hosts)


def unplaced(needs: Iterable[ExpertNeed], placement: Placement) -> list[ExpertNeed]:
    """Experts without a host, the greatest load first."""
    held = frozenset[str]().union(*placement.values())
    return sorted(
        (need for need in needs if need.expert not in held), key=lambda n: (-n.load, n.expert)
    )


def apply_move(placement: Placement, move: Move) -> dict[str, frozenset[str]]:
    """The placement after the move."""
    held = placement[move.host_id]
    changed = held | {move.expert} if move.kind is MoveKind.POOL else held - {move.expert}
    return {**placement, move.host_id: changed}


def next_move(
    needs: Sequence[ExpertNeed],
    hosts: Sequence[HostRoom],
    placement: Placement,
    config: PlacementConfig | None = None,
    pinned: Collection[tuple[str, str]] = (),
) -> Move | None:
    """The one step to take now, or None when nothing is worth one.

    ``placement`` names every host. ``pinned``: pairs of host and expert that may not be evicted now
    (resident, running or waited for). Experts that no need names are taken to have no load. Carry
    the move out, then ask again with what is true by then.
    """
    config = config or PlacementConfig()
    board = _Board(needs, hosts, placement, config, pinned)
    homeless = unplaced(needs, placement)
    first = [need for need in homeless if need.load > 0.0 or not config.idle_yields]
    last = homeless[len(first) :]  # the greatest load stands first
    moves = (board.make_place(need) for need in first)
    move = next(filter(None, moves), None) or board.improve()
    return move or next(filter(None, (board.fill(need) for need in last)), None)


def settle(
    needs: Sequence[ExpertNeed],
    hosts: Sequence[HostRoom],
    placement: Placement | None = None,
    config: PlacementConfig | None = None,
) -> dict[str, frozenset[str]]:
    """Where the moves lead if demand stays: for a plan before anything runs."""
    state = dict(placement or {host.host_id: frozenset[str]() for host in hosts})
    while (move := next_move(needs, hosts, state, config)) is not None:
        state = apply_move(state, move)
    return state


class _Board:
    """One question's facts, looked up by id."""

    def __init__(
        self,
        needs: Sequence[ExpertNeed],
        hosts: Sequence[HostRoom],
        placement: Placement,
        config: PlacementConfig,
        pinned: Collection[tuple[str, str]],
    ) -> None:
        self._needs = {need.expert: need for need in needs}
        self._hosts = hosts
        self._placement = placement
        self._config = config
        self._pinned = pinned
        self._copies = {
            expert: sum(expert in held for held in placement.values()) for expert in self._needs
        }
        self._loads = loads(needs, placement)

    # --- an expert without a host ----------------------------------------------------------------

    def make_place(self, need: ExpertNeed) -> Move | None:
        """Room as it is; else by letting go of copies; else of an expert asked for much less."""
        takers = [host for host in self._hosts if self._takes(host, need)]
        return (
            self.fill(need)
            or self._evict_for(need, takers, self._spare)
            or self._evict_for(need, takers, lambda host: self._lesser(host, need))
        )

    def fill(self, need: ExpertNeed) -> Move | None:
        """Into room as it is, on the least crowded host."""
        roomy = [
            host
            for host in self._hosts
            if self._takes(host, need) and self._free_bytes(host) >= need.size_bytes
        ]
        if not roomy:
            return None
        return Move(MoveKind.POOL, min(roomy, key=self._crowding).host_id, need.expert)

    def _evict_for(
        self,
        need: ExpertNeed,
        takers: Sequence[HostRoom],
        victims: Callable[[HostRoom], Iterable[str]],
    ) -> Move | None:
        """First of the evictions that make room, on the host where they cost least load."""
        best: tuple[float, str, str] | None = None
        for host in takers:
            chosen = self._enough(host, need, victims(host))
            if chosen:
                lost = sum(self._share(expert) for expert in chosen)
                best = min(best or (math.inf, "", ""), (lost, host.host_id, chosen[0]))
        return None if best is None else Move(MoveKind.EVICT, best[1], best[2])

    def _enough(self, host: HostRoom, need: ExpertNeed, victims: Iterable[str]) -> list[str]:
        """Of these, least load first, as many as make room; none if all together do not."""
        free, chosen = self._free_bytes(host), list[str]()
        for expert in sorted(victims, key=lambda e: (self._share(e), e)):
            chosen.append(expert)
            free += self._needs[expert].size_bytes
            if free >= need.size_bytes:
                return chosen
        return []

    def _spare(self, host: HostRoom) -> Iterator[str]:
        """Experts here that have another copy elsewhere, or yield to whoever has a use for one."""
        yielding = self._config.idle_yields
        return (
            e
            for e in self._evictable(host)
            if self._copies[e] > 1 or (yielding and self._needs[e].load == 0.0)
        )

    def _lesser(self, host: HostRoom, need: ExpertNeed) -> list[str]:
        """Copies, and only copies of experts whose loads together stay well below the need's."""
        victims = sorted(self._evictable(host), key=lambda e: (self._share(e), e))
        budget, chosen = need.load / (1.0 + self._config.gain_min), list[str]()
        for expert in victims:
            lost = self._needs[expert].load if self._copies[expert] == 1 else 0.0
            if lost < budget:
                budget -= lost
                chosen.append(expert)
        return chosen

    # --- copies ----------------------------------------------------------------------------------

    def improve(self) -> Move | None:
        """The copy that lowers the cost most; into room, or in place of another copy."""
        least = self._config.gain_min * sum(
            self._loads[host.host_id] ** 2 / host.slots for host in self._hosts
        )
        best: tuple[float, str, str, str] | None = None
        for need in self._needs.values():
            for host in self._hosts_for_copy(need):
                gain, victim = self._gain(need, host)
                if gain >= least > 0.0:
                    best = min(
                        best or (math.inf, "", "", ""), (-gain, host.host_id, need.expert, victim)
                    )
        if best is None:
            return None
        _, host_id, expert, victim = best
        return (
            Move(MoveKind.EVICT, host_id, victim)
            if victim
            else Move(MoveKind.POOL, host_id, expert)
        )

    def _hosts_for_copy(self, need: ExpertNeed) -> Iterator[HostRoom]:
        copies = self._copies[need.expert]
        if need.load > 0.0 and 0 < copies < self._config.copies_max:
            yield from (host for host in self._hosts if self._takes(host, need))

    def _gain(self, need: ExpertNeed, host: HostRoom) -> tuple[float, str]:
        """By how much the cost falls, and whose copy must go first (empty: nobody's)."""
        if self._free_bytes(host) >= need.size_bytes:
            return self._before_less_after(host, need, ""), ""
        room = (
            victim
            for victim in self._spare(host)
            if self._free_bytes(host) + self._needs[victim].size_bytes >= need.size_bytes
        )
        gains = ((self._before_less_after(host, need, victim), victim) for victim in room)
        return max(gains, default=(-math.inf, ""))

    def _before_less_after(self, host: HostRoom, need: ExpertNeed, victim: str) -> float:
        after = dict(self._loads)
        self._shift(after, need.expert, joins=host.host_id, leaves="")
        if victim:
            self._shift(after, victim, joins="", leaves=host.host_id)
        return sum(
            (self._loads[each.host_id] ** 2 - after[each.host_id] ** 2) / each.slots
            for each in self._hosts
        )

    def _shift(self, after: dict[str, float], expert: str, *, joins: str, leaves: str) -> None:
        """Move one expert's load to its new set of holders."""
        holders = {host for host, held in self._placement.items() if expert in held}
        load = self._needs[expert].load
        for host in holders:
            after[host] -= load / len(holders)
        holders = (holders | ({joins} if joins else set())) - {leaves}
        for host in holders:
            after[host] += load / len(holders)

    # --- hosts -----------------------------------------------------------------------------------

    def _takes(self, host: HostRoom, need: ExpertNeed) -> bool:
        if host.takes is not None and need.expert not in host.takes:
            return False
        held = self._placement[host.host_id]
        groups = {self._needs[e].group for e in held if e in self._needs} | {host.group}
        alike = groups - {None} <= {need.group}
        return alike and need.expert not in held and need.size_bytes <= host.memory_bytes

    def _free_bytes(self, host: HostRoom) -> int:
        held = self._placement[host.host_id]
        return host.memory_bytes - sum(self._needs[e].size_bytes for e in held if e in self._needs)

    def _evictable(self, host: HostRoom) -> list[str]:
        held = self._placement[host.host_id]
        return sorted(e for e in held if e in self._needs and (host.host_id, e) not in self._pinned)

    def _share(self, expert: str) -> float:
        """The load that one copy of it carries."""
        return self._needs[expert].load / max(1, self._copies[expert])

    def _crowding(self, host: HostRoom) -> tuple[bool, float, int, str]:
        """Hosts that could still take any group last."""
        undecided = host.group is None and not self._placement[host.host_id]
        load = self._loads[host.host_id] / host.slots
        return (undecided, load, -self._free_bytes(host), host.host_id)
