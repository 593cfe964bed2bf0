"""Several hosts behind a gateway, and all that can happen to them; rules hold after each event.

The schedulers, the choice of host, the gateway's bookkeeping and the placement are the code that
serves. What they run on is made here: engines whose weights may be damaged on the way, host memory,
a registry with expiring records, connections that break. ``Gateway`` and ``Host`` are small enough
to be replaced by ones with a known mistake (``fleet_planted``).
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NoReturn

from deployments.choose_host import MOVES_MAX, choose_host, idle_host_for
from deployments.host_directory import add_dispatched
from deployments.host_record import SWAPPING, HostRecord
from deployments.placement import (
    ExpertNeed,
    HostRoom,
    Move,
    MoveKind,
    PlacementConfig,
    next_move,
    settle,
)
from deployments.swap.config import SchedulerConfig
from deployments.swap.core import Scheduler
from deployments.swap.effects import AbortInFlight, BeginSwap, Effect, Grant, Refuse, WakeAt
from tests.sim.rates import rng_for

HEARTBEAT_MS, TTL_MS, LISTING_MS = 250.0, 3_000.0, 250.0
CALM_MS = 5_000.0  # after the last fault: hosts are back, heartbeats heard, suspicions over
REST_MS = 90_000.0
PLACE_MS, SUSPECT_MS, ATTEMPTS_MAX = 2_000.0, 2_000.0, 4
EXPERT_BYTES = 10


class Violation(AssertionError):
    """A rule of the fleet was broken."""


@dataclass(slots=True, eq=False)
class Client:
    """One caller's request. ``at``: the host that owns it now. ``end``: how it ended, once."""

    id: str
    expert: str
    service_ms: float
    at: Host | None = None
    attempts: int = 0
    moves: int = 0
    run: int = 0
    sent: bool = False
    end: str | None = None


@dataclass(eq=False)
class Host:
    """One life of one host: a scheduler, an engine, a weight pool. Dead once ``alive`` is False."""

    world: Fleet
    name: str
    experts: set[str]
    room_bytes: int
    alive: bool = True
    cut_off: bool = False  # its heartbeats do not arrive
    weights: str | None = None  # what the engine holds in truth
    loading: str | None = None
    clients: dict[str, Client] = field(default_factory=dict)
    queued: set[str] = field(default_factory=set)
    wakes: int = 0

    def __post_init__(self) -> None:
        self.pool = set(self.experts)
        # Experts may be placed here later: the scheduler knows all, the record what is served.
        self.scheduler = Scheduler(self.world.config, self.world.experts)

    # --- swaps -----------------------------------------------------------------------------------

    def begin_swap(self, expert: str) -> None:
        world, rng = self.world, self.world.rng["swaps"]
        self.weights = None
        took_ms = world.swap_ms * rng.uniform(0.8, 1.2)
        fault = rng.random() if world.faults else 1.0
        if fault < 0.05:
            took_ms *= 15.0
        fault_kind = "corrupt" if 0.05 <= fault < 0.10 else "failed" if fault < 0.13 else ""
        fault_kind = "out of memory" if 0.13 <= fault < 0.15 else fault_kind
        world.counts[f"swap {fault_kind or 'done'}"] += 1
        world.at(took_ms, lambda: self.alive and self.end_swap(expert, took_ms, fault_kind))

    def end_swap(self, expert: str, took_ms: float, fault: str) -> None:
        now_ms = self.world.now_ms
        fault = fault if self.world.faults else ""
        if fault == "out of memory":  # the engine dies of it, and the host with it
            self.world.kill(self)
            return
        self.weights = None if fault == "failed" else f"damaged {expert}" if fault else expert
        if fault == "failed" or not self.canary_passes(expert):
            self.weights = None
            self.world.do(self, self.scheduler.swap_failed(expert, fault, now_ms))
            self.world.at(2_000.0, lambda: self.alive and self.restore(expert))
        else:
            self.world.do(self, self.scheduler.swap_done(expert, now_ms, took_ms))

    def canary_passes(self, expert: str) -> bool:
        return self.weights == expert

    def restore(self, expert: str) -> None:
        self.world.do(self, self.scheduler.restore(expert, self.world.now_ms))

    # --- placement -------------------------------------------------------------------------------

    def pinned(self) -> set[str]:
        """Experts that must not be evicted now."""
        snapshot = self.scheduler.snapshot()
        busy = {client.expert for client in self.clients.values()}
        return {e for e in (snapshot.resident, snapshot.target) if e is not None} | busy

    def has_room(self) -> bool:
        held = len(self.pool) + (self.loading is not None)
        return (held + 1) * EXPERT_BYTES <= self.room_bytes

    def load(self, expert: str) -> None:
        self.loading = expert
        self.world.at(self.world.load_ms, lambda: self.alive and self.loaded(expert))

    def loaded(self, expert: str) -> None:
        self.loading = None
        self.pool.add(expert)
        self.experts.add(expert)

    def evict(self, expert: str) -> None:
        self.experts.discard(expert)
        self.pool.discard(expert)

    def record(self) -> HostRecord:
        snapshot = self.scheduler.snapshot()
        return HostRecord(
            host_id=self.name,
            url="",
            experts=tuple(sorted(self.experts)),
            resident=snapshot.resident,
            queue_depths=snapshot.queued,
            in_flight=snapshot.in_flight,
            swap_ms=snapshot.swap_ms,
            out_of_service=snapshot.out_of_service,
            slot_state=snapshot.phase.value,
            heartbeat_ms=int(self.world.now_ms),
            queued_request_ms=(snapshot.service_ms or 0.0) / snapshot.in_flight_max,
        )


class Gateway:
    """Sends each request to one host at a time; sends it elsewhere while it has sent nothing."""

    def __init__(self, world: Fleet) -> None:
        self.world = world
        self.listed: dict[str, HostRecord] = {}
        self.dispatched: dict[str, Counter[str]] = {}
        self.suspect_until: dict[str, float] = {}

    def list(self) -> None:
        before, self.listed = self.listed, self.world.registered()
        for name, record in self.listed.items():
            if name not in before or before[name].heartbeat_ms != record.heartbeat_ms:
                self.dispatched.pop(name, None)
        self.move_waiting()

    def seen(self) -> list[HostRecord]:
        return [
            add_dispatched(record, self.dispatched.get(name, Counter()))
            for name, record in self.listed.items()
            if self.suspect_until.get(name, -math.inf) <= self.world.now_ms
        ]

    def move_waiting(self) -> None:
        """Calls without a token yet, which is all that a gateway knows, go to an idle host."""
        calls: dict[tuple[Host, str], list[Client]] = {}
        for client in self.world.clients.values():
            if client.at is not None and not client.sent and client.moves < MOVES_MAX:
                calls.setdefault((client.at, client.expert), []).append(client)
        for (host, expert), waiting in calls.items():
            if idle_host_for(self.seen(), host.name, expert, self.world.now_ms) is not None:
                for client in waiting:
                    self.move(client, host)

    def move(self, client: Client, host: Host) -> None:
        client.moves += 1
        client.attempts -= 1  # no failure
        self.world.counts["moved"] += 1
        self.world.withdraw(host, client)
        client.at, client.run = None, client.run + 1
        self.send(client, but=host.name)

    def send(self, client: Client, but: str = "") -> None:
        now_ms = self.world.now_ms
        seen = [record for record in self.seen() if record.host_id != but]
        chosen = choose_host(seen, client.expert, now_ms)
        client.attempts += 1
        if chosen is None or client.attempts > ATTEMPTS_MAX:
            self.world.end(client, "unavailable")
            return
        self.dispatched.setdefault(chosen.host_id, Counter())[client.expert] += 1
        host = self.world.hosts[chosen.host_id]
        if host.alive and client.expert in host.experts:
            self.world.accept(host, client)
            return
        if host.alive:  # it answers that it no longer serves the expert
            left = tuple(expert for expert in chosen.experts if expert != client.expert)
            self.listed[host.name] = replace(self.listed[host.name], experts=left)
        else:  # the connection is refused
            self.suspect_until[host.name] = now_ms + SUSPECT_MS
        self.world.at(1.0, lambda: client.end is None and self.send(client))

    def broken(self, client: Client, host: Host) -> None:
        """The host is gone in the middle of this request."""
        self.suspect_until[host.name] = self.world.now_ms + SUSPECT_MS
        if client.sent:
            self.world.end(client, "cut")
        else:
            self.send(client)

    def left(self, client: Client) -> None:
        """The caller has hung up: the host is told."""
        if client.at is not None:
            self.world.withdraw(client.at, client)
        self.world.end(client, "left")


class Fleet:
    """One seed's run: ``run()`` returns the trace's digest or raises ``Violation``."""

    def __init__(
        self,
        seed: int,
        make_gateway: type[Gateway] = Gateway,
        make_host: type[Host] = Host,
    ) -> None:
        self.seed = seed
        concerns = ("sizes", "arrivals", "swaps", "faults")
        self.rng = {name: rng_for(seed, f"fleet {name}") for name in concerns}
        sizes: random.Random = self.rng["sizes"]
        self.experts = tuple(f"e{n}" for n in range(sizes.randint(2, 8)))
        self.popularity = [sizes.choice((1.0, 1.0, 6.0, 30.0)) for _ in self.experts]
        self.service_ms, self.swap_ms = sizes.uniform(50, 800), sizes.uniform(20, 800)
        self.load_ms = sizes.uniform(100, 2_000)
        self.config = SchedulerConfig(
            queue_max=sizes.choice((8, 64)),
            in_flight_max=sizes.randint(1, 6),
            age_bound_ms=sizes.uniform(300, 3_000),
            min_residency_ms=50.0,
            drain_deadline_ms=sizes.uniform(100, 2_000),
            queue_wait_ms_max=rng_for(seed, "fleet patience").choice((None, None, None, 30_000.0)),
        )
        self.make_host = make_host
        self.now_ms, self.sequence, self.faults = 0.0, 0, True
        self.probed = False
        self.to_probe: list[str] = []
        self.settled = False  # the event changed nothing that the rules look at
        self.events: list[tuple[float, int, Callable[[], object]]] = []
        self.clients: dict[str, Client] = {}
        self.registry: dict[str, tuple[float, HostRecord]] = {}  # name: expiry, record
        self.rates = dict.fromkeys(self.experts, 0.0)
        self.counts: Counter[str] = Counter()
        self.digest = hashlib.sha256()
        self.hosts: dict[str, Host] = {}
        self._open(sizes.randint(2, 4), sizes)
        self.gateway = make_gateway(self)
        self.gateway.list()

    def _open(self, count: int, sizes: random.Random) -> None:
        places = max(-(-len(self.experts) // count), sizes.randint(1, len(self.experts)))
        self.rooms = [HostRoom(f"h{n}", places * EXPERT_BYTES) for n in range(count)]
        plan = settle([self._need(e, 1.0) for e in self.experts], self.rooms)
        for room in self.rooms:
            self._boot(room, set(plan[room.host_id]))

    def _boot(self, room: HostRoom, experts: set[str]) -> None:
        """A fresh life under a fresh id, as the registry asks for."""
        lives = sum(name.startswith(f"{room.host_id}.") for name in self.hosts)
        host = self.make_host(self, f"{room.host_id}.{lives}", experts, room.memory_bytes)
        self.hosts[host.name] = host
        self._heartbeat(host)

    # --- time ------------------------------------------------------------------------------------

    def at(self, delay_ms: float, act: Callable[[], object]) -> None:
        self.sequence += 1
        heapq.heappush(self.events, (self.now_ms + delay_ms, self.sequence, act))

    def run(self) -> str:
        self._plan()
        while self.events:
            self.counts["steps"] += 1
            self.expect(self.counts["steps"] < 200_000, "it never comes to rest")
            self.now_ms, _, act = heapq.heappop(self.events)
            self.settled = False
            act()
            if not self.settled:
                self._check()
        self._check_rest()
        return self.digest.hexdigest()

    def _plan(self) -> None:
        rng, time_ms = self.rng["arrivals"], 0.0
        self.at(LISTING_MS, self._list)
        self.at(PLACE_MS, self._place)
        slots = len(self.rooms) * self.config.in_flight_max
        for number in range(rng.randint(40, 120)):
            time_ms += rng.expovariate(slots / self.service_ms * rng.choice((0.3, 0.8)))
            expert = rng.choices(self.experts, self.popularity)[0]
            service_ms = self.service_ms * min(4.0, rng.expovariate(1.0))
            self.at(time_ms, self._arrival(Client(f"r{number}", expert, service_ms)))
            if rng.random() < 0.15:
                name, patience_ms = f"r{number}", rng.expovariate(1.0 / (2 * self.service_ms))
                self.at(time_ms + patience_ms, lambda name=name: self._leave(self.clients[name]))
        self.ends_ms = time_ms
        faults = self.rng["faults"]
        for _ in range(faults.randint(0, 3)):
            self.at(faults.uniform(0, time_ms), self._kill_one)
        for _ in range(faults.randint(0, 3)):
            self.at(faults.uniform(0, time_ms), self._cut_one_off)
        self.at(time_ms, self._stop_faults)

    def _stop_faults(self) -> None:
        self.faults = False
        for host in self.hosts.values():
            host.cut_off = False

    @property
    def open(self) -> bool:
        """Whether the clockwork has to go on: load to come, or requests to be ended."""
        if self.now_ms > self.ends_ms + REST_MS:  # longer than any queue lets wait
            return False
        coming = self.now_ms <= self.ends_ms + CALM_MS or not self.probed
        return coming or any(c.end is None for c in self.clients.values())

    # --- clients ---------------------------------------------------------------------------------

    def _arrival(self, client: Client) -> Callable[[], None]:
        def arrive() -> None:
            self.clients[client.id] = client
            self.rates[client.expert] += client.service_ms
            self.gateway.send(client)

        return arrive

    def _leave(self, client: Client) -> None:
        if client.end is None:
            self.gateway.left(client)

    def end(self, client: Client, how: str) -> None:
        self.expect(client.end is None, f"{client.id} ended twice: {client.end}, then {how}")
        client.end, client.at = how, None
        client.run += 1
        self.counts[how] += 1
        if client.id.startswith("probe"):
            self._probe_next()
        self.digest.update(f"{self.now_ms:.6f} {client.id} {how}\n".encode())

    # --- hosts -----------------------------------------------------------------------------------

    def accept(self, host: Host, client: Client) -> None:
        client.at = host
        host.clients[client.id] = client
        host.queued.add(client.id)
        arrived = host.scheduler.arrive(client.id, client.expert, now_ms=self.now_ms)
        self.do(host, arrived)

    def withdraw(self, host: Host, client: Client) -> None:
        host.clients.pop(client.id)
        host.queued.discard(client.id)
        self.do(host, host.scheduler.cancel(client.id, self.now_ms))

    def kill(self, host: Host) -> None:
        host.alive = False
        self.counts["deaths"] += 1
        orphans = list(host.clients.values())
        host.clients.clear()
        for client in orphans:
            client.at, client.run = None, client.run + 1
            self.gateway.broken(client, host)
        room = next(r for r in self.rooms if host.name.startswith(f"{r.host_id}."))
        kept = set(host.experts)
        self.at(1_500.0, lambda: self._boot(room, kept))

    def do(self, host: Host, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Grant(name):
                    self._run(host, host.clients[name])
                case Refuse(name):
                    client = host.clients.pop(name)
                    host.queued.discard(name)
                    self.end(client, f"refused {effect.reason}")
                case BeginSwap(expert):
                    self.expect(
                        not self._running(host), f"{host.name} swaps under running requests"
                    )
                    self.expect(expert in host.pool, f"{host.name} swaps to {expert}, not pooled")
                    host.begin_swap(expert)
                case AbortInFlight(names):
                    for name in names:
                        self._stop(host, host.clients[name])
                case WakeAt(at_ms):
                    self._wake(host, at_ms)

    def _run(self, host: Host, client: Client) -> None:
        self.expect(client.at is host, f"{client.id} granted at {host.name}, which is no owner")
        host.queued.discard(client.id)
        client.run += 1
        run = client.run

        def current() -> bool:
            return host.alive and client.run == run

        def first() -> None:
            if current() and host.scheduler.first_token(client.id):
                self.expect(not client.sent, f"{client.id} started again after its first token")
                self._token(host, client)
                client.sent = True

        def done() -> None:
            if current():
                self._token(host, client)
                host.clients.pop(client.id)
                self.end(client, "served")
                self.do(host, host.scheduler.finish(client.id, self.now_ms))

        self.at(client.service_ms * 0.3, first)
        self.at(client.service_ms, done)

    def _token(self, host: Host, client: Client) -> None:
        self.expect(
            host.weights == client.expert,
            f"a token for {client.expert} from {host.weights} at {host.name}",
        )
        self.expect(client.end is None, f"a token for {client.id}, which has ended")

    def _stop(self, host: Host, client: Client) -> None:
        self.expect(not client.sent, f"{client.id} cut after its first token")
        client.run += 1
        host.queued.add(client.id)
        self.do(host, host.scheduler.requeue(client.id, self.now_ms))

    def _wake(self, host: Host, at_ms: float | None) -> None:
        host.wakes += 1
        number = host.wakes
        if at_ms is not None:

            def tick() -> None:
                if host.alive and host.wakes == number:
                    self.do(host, host.scheduler.tick(self.now_ms))

            self.at(max(0.0, at_ms - self.now_ms), tick)

    # --- registry, faults, placement -------------------------------------------------------------

    def registered(self) -> dict[str, HostRecord]:
        return {n: record for n, (until, record) in self.registry.items() if until > self.now_ms}

    def _heartbeat(self, host: Host) -> None:
        self.settled = True
        if not host.alive:
            return
        if not host.cut_off:
            self.registry[host.name] = (self.now_ms + TTL_MS, host.record())
        if self.now_ms == 0.0 or self.open:
            self.at(HEARTBEAT_MS, lambda: self._heartbeat(host))

    def _list(self) -> None:
        self.settled = True
        self.gateway.list()
        if self.now_ms > self.ends_ms + CALM_MS and not self.probed:
            self._probe()
        if self.open:
            self.at(LISTING_MS, self._list)

    def _probe(self) -> None:
        """Once all requests have ended after the last fault, and no swap from before is under way
        (which may be slow, and no wait outlasts it), every expert must be served again.

        When the last host of an expert dies late, placement gives it another first, which takes
        moves, a load and a heartbeat. If the gateway never hears of one, nobody is asked, and the
        end of the run says so.
        """
        heard = {expert for record in self.gateway.seen() for expert in record.experts}
        at_rest = not any(host.record().slot_state == SWAPPING for host in self._living())
        ended = all(client.end is not None for client in self.clients.values())
        if heard >= set(self.experts) and at_rest and ended:
            self.probed = True
            self.to_probe = list(self.experts)
            self._probe_next()

    def _probe_next(self) -> None:
        """One at a time: what one slow swap was measured to take may refuse a crowd with reason."""
        if self.to_probe:
            expert = self.to_probe.pop()
            self.at(0.0, self._arrival(Client(f"probe {expert}", expert, 50.0)))

    def _living(self) -> list[Host]:
        return [host for host in self.hosts.values() if host.alive]

    def _kill_one(self) -> None:
        if living := self._living():
            self.kill(self.rng["faults"].choice(living))

    def _cut_one_off(self) -> None:
        """Its heartbeats are lost, longer than they are believed in; requests there go on."""
        if living := self._living():
            host = self.rng["faults"].choice(living)
            host.cut_off = True
            self.counts["cut off"] += 1
            self.at(
                self.rng["faults"].uniform(0, 3 * TTL_MS), lambda: setattr(host, "cut_off", False)
            )

    def _need(self, expert: str, load: float) -> ExpertNeed:
        return ExpertNeed(expert, EXPERT_BYTES, "one", load)

    def _place(self) -> None:
        """One move, by what has been asked for lately and what each living host holds."""
        living = {host.name: host for host in self._living()}
        busy = any(host.loading for host in living.values())
        if living and not busy:
            needs = [self._need(e, load / PLACE_MS) for e, load in self.rates.items()]
            rooms = [HostRoom(name, host.room_bytes) for name, host in living.items()]
            held = {name: frozenset(host.pool) for name, host in living.items()}
            pinned = {(name, e) for name, host in living.items() for e in host.pinned()}
            pinned |= {(name, e) for e in self.experts for name in self._last_in_service(e)}
            move = next_move(needs, rooms, held, PlacementConfig(gain_min=0.1), pinned)
            if move is not None:
                self.counts[f"move {move.kind}"] += 1
                self._move(living[move.host_id], move)
        self.rates = {expert: load * 0.5 for expert, load in self.rates.items()}
        if self.open:
            self.at(PLACE_MS / 4, self._place)

    def _last_in_service(self, expert: str) -> list[str]:
        """The one host where it can be had, if there is one: other copies may be out of service."""
        at = [host.name for host in self._living() if host.record().serves(expert)]
        return at if len(at) == 1 else []

    def _move(self, host: Host, move: Move) -> None:
        if move.kind is MoveKind.POOL:
            self.expect(host.has_room(), f"{host.name} has no room for {move.expert}")
            host.load(move.expert)
        else:
            self.expect(move.expert not in host.pinned(), f"{move.expert} is in use at {host.name}")
            host.evict(move.expert)

    # --- rules -----------------------------------------------------------------------------------

    def fail(self, rule: str) -> NoReturn:
        raise Violation(f"seed {self.seed} at {self.now_ms:.3f} ms: {rule}")

    def expect(self, holds: bool, rule: str) -> None:
        if not holds:
            self.fail(rule)

    def _running(self, host: Host) -> set[str]:
        return set(host.clients) - host.queued

    def _check(self) -> None:
        owned: Counter[str] = Counter()
        for host in self.hosts.values():
            if not host.alive:
                continue
            owned.update(list(host.clients))
            self.expect(
                host.scheduler.in_flight_ids == self._running(host), "in-flight sets differ"
            )
            self.expect(host.scheduler.queued_ids == host.queued, "waiting sets differ")
            limit = self.config.in_flight_max
            self.expect(len(self._running(host)) <= limit, "too many in flight")
            self.expect(len(host.queued) <= self.config.queue_max + limit, "a queue over its bound")
            held = len(host.pool) + (host.loading is not None)
            self.expect(held * EXPERT_BYTES <= host.room_bytes, f"{host.name} is over its memory")
        twice = [name for name, owners in owned.items() if owners > 1]
        self.expect(not twice, f"two owners of {twice}")
        for name in owned:
            self.expect(self.clients[name].end is None, f"{name} has ended and is still owned")

    def _check_rest(self) -> None:
        without = [client.id for client in self.clients.values() if client.end is None]
        self.expect(not without, f"without an end: {without}")
        self.expect(not any(host.clients for host in self._living()), "work is left at the end")
        probes = {c.expert: c.end for c in self.clients.values() if c.id.startswith("probe")}
        self.expect(set(probes) == set(self.experts), f"not asked after the faults: {probes}")
        self.expect(set(probes.values()) == {"served"}, f"not served after the faults: {probes}")
