"""A small cluster in virtual time for the placement planner: hosts with a pool, demand that shifts,
hosts that die and fall silent, commands that take time and may be refused. The planner is the code
that serves; rules hold after every second."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from deployments.host_record import HostRecord, PoolRecord
from deployments.placement import Move, MoveKind, PlacementConfig
from deployments.placement_planner import MoveOutcome, PlacementPlanner, PlannerConfig

STEP_MS = 1_000.0
CONFIG = PlannerConfig(
    half_life_ms=20_000,
    pause_ms=2_000,
    backoff_ms_max=60_000,
    placement=PlacementConfig(gain_min=0.05, idle_yields=True),
)


@dataclass(eq=False)
class FakeHost:
    """One life of one host. ``served``: expert -> slots of load that requests bring here now."""

    name: str
    places: int
    entry_bytes: int
    experts: tuple[str, ...]
    pooled: set[str] = field(default_factory=set)
    resident: str | None = None
    waited_for: set[str] = field(default_factory=set)
    loading: str | None = None
    silent: bool = False
    work: Counter[str] = field(default_factory=Counter)
    told: HostRecord | None = None

    def record(self, now_ms: float) -> HostRecord:
        """As the store has it: the last one, while the host is silent."""
        if self.silent and self.told is not None:
            return self.told
        pool = PoolRecord(
            "arch",
            self.places * self.entry_bytes + self.entry_bytes // 2,  # the rest holds nobody
            self.entry_bytes,
            self.experts,
            tuple(sorted(self.pooled)),
        )
        self.told = HostRecord(
            self.name,
            f"http://{self.name}",
            self.experts,
            resident=self.resident,
            queue_depths=dict.fromkeys(self.waited_for, 1),
            heartbeat_ms=int(now_ms),
            pools=(pool,),
            work={expert: (1, int(ms)) for expert, ms in self.work.items()},
            moving=self.loading,
        )
        return self.told

    def serve(self, shares: Mapping[str, float], rng: random.Random) -> int:
        """A second of requests; how many experts had to be read from disk for them."""
        self.waited_for = {e for e in shares if rng.random() < 0.3}
        loads = 0
        for expert, load in sorted(shares.items()):
            if expert not in self.pooled and expert != self.loading:
                if len(self.pooled) + (self.loading is not None) >= self.places:
                    spare = sorted(self.pooled - {self.resident})
                    if not spare:
                        continue
                    self.pooled.discard(min(spare, key=lambda e: (shares.get(e, 0.0), e)))
                self.pooled.add(expert)
                loads += 1
            self.resident = expert
            self.work[expert] += round(load * STEP_MS)
        return loads


class Cluster:
    """``demand``: expert -> slots that its requests would keep busy."""

    def __init__(self, demand: dict[str, float], rng: random.Random) -> None:
        self.demand = demand
        self.rng = rng
        self.hosts: dict[str, FakeHost] = {}
        self.planner = PlacementPlanner(CONFIG)
        self.now_ms = 0.0
        self.under_way: tuple[Move, float] | None = None
        self.moves: list[tuple[float, Move, MoveOutcome]] = []
        self.read_on_demand: list[float] = []
        self.copies_seen: Counter[str] = Counter()

    def add(self, host: FakeHost) -> None:
        self.hosts[host.name] = host

    def kill(self, name: str) -> None:
        del self.hosts[name]

    def copies(self, expert: str) -> int:
        return sum(expert in host.pooled for host in self.hosts.values())

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now_ms += STEP_MS
            self._serve()
            self._end_move()
            self._decide()
            self.check()

    def moves_since(self, ms: float) -> list[Move]:
        return [move for at_ms, move, _ in self.moves if at_ms >= ms]

    def _serve(self) -> None:
        """Requests go where the weights are; else to the largest host that may have them."""
        shares: dict[str, dict[str, float]] = {name: {} for name in self.hosts}
        for expert, load in self.demand.items():
            able = [h for h in self.hosts.values() if expert in h.experts]
            able.sort(key=lambda host: (-host.places, host.name))
            chosen = [h for h in able if expert in h.pooled] or able[:1]
            for host in chosen if load else ():
                shares[host.name][expert] = load / len(chosen)
        for host in self.hosts.values():
            if host.serve(shares[host.name], self.rng):
                self.read_on_demand.append(self.now_ms)

    def _decide(self) -> None:
        self.planner.observe([h.record(self.now_ms) for h in self.hosts.values()], self.now_ms)
        question = self.planner.question(self.now_ms)
        if question is None:
            return
        assert self.under_way is None, "a second move while one is under way"
        move = question.answer()
        if move is None:
            self.planner.at_rest(self.now_ms)
            return
        told = self.hosts[move.host_id].told
        assert told is not None
        assert not self.hosts[move.host_id].silent, "a silent host moves"
        if move.kind is MoveKind.EVICT:
            assert move.expert != told.resident, "the resident is to be evicted"
            assert not told.queue_depths.get(move.expert), "who is waited for is to be evicted"
        else:
            assert move.expert in told.experts, "it may not serve that"
        self.planner.begin(move)
        self._begin(move)

    def _begin(self, move: Move) -> None:
        """As ``WeightLoading`` does: into free room only; nobody who is needed is let go."""
        host = self.hosts[move.host_id]
        if move.kind is MoveKind.EVICT:
            needed = move.expert == host.resident or move.expert in host.waited_for
            if not needed:
                host.pooled.discard(move.expert)
            self._ended(move, MoveOutcome.REFUSED if needed else MoveOutcome.DONE)
        elif len(host.pooled) >= host.places and move.expert not in host.pooled:
            self._ended(move, MoveOutcome.REFUSED)
        else:
            host.loading = move.expert
            self.under_way = (move, self.now_ms + self.rng.choice((500.0, 3_000.0, 8_000.0)))

    def _end_move(self) -> None:
        if self.under_way is None:
            return
        move, ends_ms = self.under_way
        host = self.hosts.get(move.host_id)
        if host is not None and self.now_ms < ends_ms:
            return
        self.under_way = None
        if host is None:
            self._ended(move, MoveOutcome.FAILED)
            return
        host.loading = None
        host.pooled.add(move.expert)
        self._ended(move, MoveOutcome.DONE)

    def _ended(self, move: Move, outcome: MoveOutcome) -> None:
        self.moves.append((self.now_ms, move, outcome))
        self.planner.end(move, outcome, self.now_ms)

    def check(self) -> None:
        for host in self.hosts.values():
            held = len(host.pooled | ({host.loading} if host.loading else set()))
            assert held <= host.places, f"{host.name} holds {held} of {host.places}"
            assert host.resident is None or host.resident in host.pooled, "the resident was evicted"
