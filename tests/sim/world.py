"""A world round the pure scheduler: clients, an engine, faults, and rules that are never broken.

Everything random comes from generators that are seeded per concern, so that a new fault does not
reshuffle the arrivals of a known seed. The world keeps its own books and compares them with the
scheduler's after every event; ``Violation`` says what differed, when, and how to see it again.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import NoReturn

from deployments.swap.config import SchedulerConfig
from deployments.swap.core import Scheduler
from deployments.swap.effects import (
    AbortInFlight,
    BeginSwap,
    Effect,
    Grant,
    Refusal,
    Refuse,
    WakeAt,
)
from deployments.swap.states import SlotPhase
from tests.sim.promises import Promises
from tests.sim.rates import Rates, draw_rates, rng_for

MakeScheduler = Callable[
    [SchedulerConfig, Sequence[str], str | None, Mapping[str, str] | None], Scheduler
]


class Violation(AssertionError):
    """The scheduler broke a rule."""


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    SERVED = auto()
    REFUSED = auto()
    LEFT = auto()
    LOST = auto()  # its host restarted


@dataclass(slots=True)
class Client:
    id: str
    expert: str
    arrived_ms: float
    limit_ms: float
    first_token_ms: float
    service_ms: float
    status: Status = Status.WAITING
    sent: bool = False
    run: int = 0  # counts grants: what was planned for an earlier run is void
    waiting_since_ms: float = 0.0
    waited_before_ms: float = 0.0  # before runs that were taken back
    must_start_within_ms: float = math.inf
    aborts: int = 0
    stopping: bool = False  # aborted, and not yet off the device


class Device:
    """Memory of one device on which engines of several architectures sleep in turn.

    An awake engine takes what the sleepers' residue leaves; two awake at once do not fit. An engine
    whose wake has failed is killed, and starts again when it is asked for.
    """

    def __init__(self, engines: Mapping[str, str], residue: float, resident: str | None) -> None:
        self._engine_of = engines
        self._residue = residue
        self._asleep: set[str] = set(engines.values())
        self._awake: str | None = None
        if resident is not None:
            self.turn(resident)

    @property
    def used(self) -> float:
        awake = 1.0 - self._residue * len(set(self._engine_of.values())) if self._awake else 0.0
        return awake + self._residue * len(self._asleep)

    def turn(self, expert: str) -> bool:
        """Make the expert's engine the one that is awake; whether it was not."""
        engine = self._engine_of.get(expert)
        if engine is None or engine == self._awake:
            return False
        if self._awake is not None:
            self._asleep.add(self._awake)
        self._asleep.discard(engine)
        self._awake = engine
        return True

    def lost(self, expert: str) -> None:
        if self._awake is not None and self._awake == self._engine_of.get(expert):
            self._awake = None


@dataclass
class World:
    """One seed's run. ``run()`` returns the trace's digest or raises ``Violation``."""

    seed: int
    make_scheduler: MakeScheduler = Scheduler
    clients: dict[str, Client] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rates: Rates = draw_rates(self.seed)
        self.rng = {
            name: rng_for(self.seed, name)
            for name in ("arrivals", "service", "swaps", "leavers", "operator", "restarts", "timer")
        }
        self.now_ms = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.sequence = 0
        self.epoch = 0
        self.resident: str | None = None
        self.resident_since_ms = -math.inf
        self.swapping: str | None = None
        self.swapped_to: str | None = None  # by the newest swap, which may be under way
        self.swap_began_ms, self.swap_ended_ms = math.nan, math.nan
        self.waiting: set[str] = set()
        self.running: set[str] = set()
        self.retired: set[str] = set()
        self.wake: tuple[float, int] | None = None
        self.wakes = 0
        self.last_grant_ms = -math.inf
        self.arriving: str | None = None
        self.faults = True
        self.digest = hashlib.sha256()
        self._boot()

    # --- the run ---------------------------------------------------------------------------------

    def run(self) -> str:
        self._plan_load()
        steps_max = 10_000 + 100 * self.rates.requests
        while self.events:
            self.counts["steps"] += 1
            self.expect(self.counts["steps"] <= steps_max, "timers that never end")
            self.now_ms, _, act = heapq.heappop(self.events)
            act()
            self._check_books()
        self._check_rest()
        return self.digest.hexdigest()

    def fail(self, rule: str) -> NoReturn:
        raise Violation(
            f"seed {self.seed} at {self.now_ms:.3f} ms: {rule}\n"
            f"again: COE_SIM_SEED={self.seed} python -m pytest tests/sim/test_scheduler_sim.py"
        )

    def expect(self, holds: bool, rule: str) -> None:
        if not holds:
            self.fail(rule)

    def at(self, delay_ms: float, act: Callable[[], None]) -> None:
        self.sequence += 1
        heapq.heappush(self.events, (self.now_ms + delay_ms, self.sequence, act))

    def note(self, *what: object) -> None:
        self.digest.update(f"{self.now_ms:.6f} {what}\n".encode())

    def _boot(self) -> None:
        """A fresh host: nobody waits, nothing runs; sometimes an expert is resident already."""
        self.epoch += 1
        self.resident = self.rng["restarts"].choice([None, *self.rates.experts])
        self.swapping, self.wake = None, None
        self.retired.clear()
        engines = self.rates.engines
        self.scheduler = self.make_scheduler(
            self.rates.config, self.rates.experts, self.resident, engines or None
        )
        self.device = Device(engines, self.rates.residue, self.resident)
        self.resident_since_ms = -math.inf
        self.promises = Promises(self)
        self.note("boot", self.resident)

    def _plan_load(self) -> None:
        rng, rates = self.rng["arrivals"], self.rates
        time_ms = 0.0
        for number in range(rates.requests):
            time_ms += rng.expovariate(1.0 / rates.between_arrivals_ms)
            self.at(time_ms, self._arrival(f"r{number}"))
        for _ in range(rates.restarts):
            self.at(self.rng["restarts"].uniform(0, time_ms), self._restart)
        for _ in range(rates.retirements):
            self.at(self.rng["operator"].uniform(0, time_ms), self._retire)
        self.load_ends_ms = time_ms
        self.at(time_ms, self._stop_faults)

    def _stop_faults(self) -> None:
        """From here on everything works; what waits must be served and all must come to rest."""
        self.faults = False
        for expert in sorted(self.retired):
            self._restore(expert)

    # --- clients ---------------------------------------------------------------------------------

    def _arrival(self, name: str) -> Callable[[], None]:
        rng, rates = self.rng["arrivals"], self.rates
        expert = rng.choices(rates.experts, rates.popularity)[0]
        limit_ms = rates.draw_limit_ms(rng)
        priority = rng.choice(rates.priorities)
        announced = rng.random() < rates.announce_chance
        service_ms = rates.draw_service_ms(self.rng["service"])
        first_ms = service_ms * self.rng["service"].uniform(0, rates.first_token_share)
        leaves_ms = rates.draw_leaving_ms(self.rng["leavers"])

        def arrive() -> None:
            bound_ms = rates.config.queue_wait_ms_max
            named = [ms for ms in (limit_ms, bound_ms) if ms is not None]
            patience_ms = min(named, default=math.inf)
            client = Client(name, expert, self.now_ms, patience_ms, first_ms, service_ms)
            client.waiting_since_ms = self.now_ms
            client.must_start_within_ms = self._starvation_bound_ms(client)
            self.clients[name] = client
            self.waiting.add(name)
            self.note("arrive", name, expert)
            self.arriving = name
            if announced:
                self.do(self.scheduler.announce(expert, self.now_ms))
            self.do(
                self.scheduler.arrive(
                    name, expert, priority=priority, deadline_ms=limit_ms, now_ms=self.now_ms
                )
            )
            self.arriving = None
            if leaves_ms is not None:
                self.at(leaves_ms, lambda: self._leave(client))

        return arrive

    def _leave(self, client: Client) -> None:
        """The connection breaks, in whatever phase the request is."""
        if client.status not in (Status.WAITING, Status.RUNNING):
            return
        self.note("leave", client.id)
        self._end(client, Status.LEFT)
        self.do(self.scheduler.cancel(client.id, self.now_ms))

    def _end(self, client: Client, status: Status) -> None:
        self.expect(
            client.status in (Status.WAITING, Status.RUNNING), f"{client.id} ended a second time"
        )
        client.status = status
        client.run += 1
        self.counts[status.name] += 1
        self.waiting.discard(client.id)
        self.running.discard(client.id)

    def _start(self, client: Client) -> None:
        client.run += 1
        run = client.run

        def first_token() -> None:
            if client.run == run and client.status is Status.RUNNING:
                client.sent = self.scheduler.first_token(client.id)

        def done() -> None:
            if client.run == run and client.status is Status.RUNNING:
                self.note("done", client.id)
                self._end(client, Status.SERVED)
                self.do(self.scheduler.finish(client.id, self.now_ms))

        self.at(client.first_token_ms, first_token)
        self.at(client.service_ms, done)

    def _stop_and_requeue(self, client: Client) -> None:
        """The host stops a generation, which takes a moment, and sends the request back."""
        client.run += 1
        run = client.run

        def requeue() -> None:
            if client.run != run or client.status is not Status.RUNNING:
                return
            self.note("requeue", client.id)
            client.status = Status.WAITING
            client.stopping = False
            client.waiting_since_ms = self.now_ms
            client.must_start_within_ms = self._starvation_bound_ms(client)
            self.running.discard(client.id)
            self.waiting.add(client.id)
            self.do(self.scheduler.requeue(client.id, self.now_ms))

        self.at(self.rates.abort_ms, requeue)

    # --- the host --------------------------------------------------------------------------------

    def _restart(self) -> None:
        self.note("restart")
        for name in sorted(self.waiting | self.running):
            self._end(self.clients[name], Status.LOST)
        self._boot()

    def _retire(self) -> None:
        expert = self.rng["operator"].choice(self.rates.experts)
        self.note("retire", expert)
        self.promises.broken()
        self.retired.add(expert)
        self.do(self.scheduler.retire(expert, "by the operator", self.now_ms))
        if self.resident == expert and not self.running and self.swapping is None:
            self.resident = None
        self._restore_later(expert)

    def _restore_later(self, expert: str) -> None:
        epoch = self.epoch

        def restore() -> None:
            if self.epoch == epoch and expert in self.retired:
                self._restore(expert)

        self.at(self.rng["operator"].uniform(0, self.rates.out_ms_max), restore)

    def _restore(self, expert: str) -> None:
        self.note("restore", expert)
        self.retired.discard(expert)
        self.do(self.scheduler.restore(expert, self.now_ms))

    def _swap(self, expert: str) -> None:
        rng, rates, epoch = self.rng["swaps"], self.rates, self.epoch
        swap_ms = rates.swap_ms * rng.uniform(0.8, 1.2)
        slow, broken = rng.random() < rates.slow_chance, rng.random() < rates.swap_fails_chance
        if self.faults and slow:
            swap_ms *= rates.slow_factor
        reason = rng.choice(("copy failed", "canary differs"))
        turns = self.device.turn(expert)
        self.expect(self.device.used <= 1.0, f"{self.device.used:.2f} of the device is in use")
        if turns:
            swap_ms += 2 * rates.wake_ms * rng.uniform(0.5, 1.0)
            self.counts["turns of engines"] += 1
            if broken:
                reason = "out of memory in wake"

        def end() -> None:
            if self.epoch != epoch:
                return
            self.note("swap ends", expert)
            self.swapping, self.swap_ended_ms = None, self.now_ms
            if self.faults and broken:
                self.device.lost(expert)
                self.retired.add(expert)
                self.counts["swaps failed"] += 1
                self.promises.broken()
                self.do(self.scheduler.swap_failed(expert, reason, self.now_ms))
                self._restore_later(expert)
                return
            self.resident, self.resident_since_ms = expert, self.now_ms
            self.do(self.scheduler.swap_done(expert, self.now_ms, swap_ms))

        self.at(swap_ms, end)

    def _set_wake(self, at_ms: float | None) -> None:
        self.wakes += 1
        number = self.wakes
        if at_ms is None:
            self.wake = None
            return
        self.wake = (at_ms, number)
        late_ms = self.rng["timer"].uniform(0, self.rates.timer_late_ms)

        def tick() -> None:
            if self.wake is not None and self.wake[1] == number:
                self.wake = None
                self.do(self.scheduler.tick(self.now_ms))

        self.at(max(0.0, at_ms - self.now_ms) + late_ms, tick)

    # --- effects, each against the rules ---------------------------------------------------------

    def do(self, effects: list[Effect]) -> None:
        for effect in effects:
            self.note(effect)
            match effect:
                case Grant(name):
                    self._on_grant(self._client(name))
                case Refuse():
                    self._on_refuse(effect)
                case BeginSwap(expert):
                    self._on_begin_swap(expert)
                case AbortInFlight(names):
                    self._on_abort([self._client(name) for name in names])
                case WakeAt(at_ms):
                    self._set_wake(at_ms)

    def _client(self, name: str) -> Client:
        return self.clients[name]

    def _on_grant(self, client: Client) -> None:
        self.expect(client.status is Status.WAITING, f"{client.id} granted while {client.status}")
        self.expect(self.swapping is None, f"{client.id} granted during a swap")
        self.expect(
            self.resident == client.expert,
            f"{client.id} wants {client.expert}, granted while {self.resident} is resident",
        )
        self.expect(client.expert not in self.retired, f"{client.id} granted to a retired expert")
        waited_ms = self.now_ms - client.waiting_since_ms
        self.expect(
            waited_ms <= client.must_start_within_ms,
            f"{client.id} starved: waited {waited_ms:.0f}, bound {client.must_start_within_ms:.0f}",
        )
        self._check_wait(client)
        config = self.rates.config
        turn_ms = config.age_bound_ms + config.drain_deadline_ms + self.rates.moments_ms
        if waited_ms > turn_ms and config.queue_wait_ms_max is None:
            self.counts["waited its own swap out"] += 1
        self.promises.started(client)
        client.waited_before_ms += waited_ms
        client.status = Status.RUNNING
        self.waiting.discard(client.id)
        self.running.add(client.id)
        self.expect(len(self.running) <= self.rates.config.in_flight_max, "too many in flight")
        self.last_grant_ms = self.now_ms
        self.counts["grants"] += 1
        self._start(client)

    def _on_refuse(self, refusal: Refuse) -> None:
        client = self._client(refusal.request_id)
        name, config = client.id, self.rates.config
        waited_ms = self.now_ms - client.waiting_since_ms
        self.expect(client.status is Status.WAITING, f"{name} refused while {client.status}")
        self.expect(refusal.wait_ms >= 0, f"{name} refused with a negative wait")
        if refusal.reason is Refusal.OUT_OF_SERVICE:
            self.expect(client.expert in self.retired, f"{name}: {client.expert} is in service")
            self.expect(bool(refusal.detail), f"{name} was not told why")
        elif refusal.reason is Refusal.QUEUE_FULL:
            self.expect(name == self.arriving, f"{name} had been accepted")
            self.expect(len(self.waiting) > config.queue_max, f"{name}: the queue has room")
        elif name == self.arriving and refusal.wait_ms <= refusal.limit_ms:
            self.fail(f"{name} refused though its wait fits")
        elif name != self.arriving:
            self.expect(waited_ms <= client.must_start_within_ms, f"{name} starved, then refused")
            self.expect(refusal.wait_ms >= waited_ms, f"{name} was not told how long it waited")
            self._check_wait(client)
            self._check_not_early(client)
        self._end(client, Status.REFUSED)
        self.counts[f"refused {refusal.reason}"] += 1

    def _on_begin_swap(self, expert: str) -> None:
        self.expect(not self.running, f"swap to {expert} under running requests")
        self.expect(self.swapping is None, f"swap to {expert} during another")
        self.expect(expert not in self.retired, f"swap to {expert}, which is out of service")
        wanted = any(self.clients[name].expert == expert for name in self.waiting)
        self.expect(wanted, f"swap to {expert}, for which nobody waits")
        self.promises.swap_begins()
        self.resident, self.swapping = None, expert
        self.swapped_to, self.swap_began_ms = expert, self.now_ms
        self.counts["swaps"] += 1
        self._swap(expert)

    def _on_abort(self, clients: list[Client]) -> None:
        drained_ms = self.now_ms - self.last_grant_ms
        self.expect(
            drained_ms >= self.rates.config.drain_deadline_ms - 1e-6, "aborted before the deadline"
        )
        for client in clients:
            self.expect(client.status is Status.RUNNING, f"{client.id} aborted, not running")
            self.expect(not client.sent, f"{client.id} cut after its first token")
            self.expect(client.aborts == 0, f"{client.id} aborted twice")
            client.aborts += 1
            client.stopping = True
            self.counts["aborts"] += 1
            self._stop_and_requeue(client)

    # --- the books -------------------------------------------------------------------------------

    def _check_books(self) -> None:
        scheduler, config = self.scheduler, self.rates.config
        self.expect(scheduler.in_flight_ids == self.running, "in-flight sets differ")
        self.expect(scheduler.queued_ids == self.waiting, "waiting sets differ")
        bound = config.queue_max + config.in_flight_max
        self.expect(len(self.waiting) <= bound, "the queue is over its bound")
        for name in self.waiting:
            self._check_wait(self.clients[name])
        phase = scheduler.phase
        self.expect((phase is SlotPhase.SWAPPING) == (self.swapping is not None), "swap unknown")
        if phase is SlotPhase.EMPTY:
            self.resident = None  # an eviction needs no effect: nothing is left in the engine
            self.expect(not self.waiting, "requests wait before an empty slot")
        self.expect(scheduler.resident == self.resident, "residents differ")
        if self.waiting:
            self.expect(self.wake is not None, "requests wait and no wake-up is asked for")
        if phase is SlotPhase.SERVING:
            self._check_serving()
        self.promises.look()

    def _waited_ms(self, client: Client) -> float:
        return client.waited_before_ms + self.now_ms - client.waiting_since_ms

    def _own_swap_ms(self, client: Client) -> float:
        """How much of its wait was the swap to its own expert that is under way or ends now."""
        runs = self.swapping is not None or self.swap_ended_ms == self.now_ms
        if not runs or self.swapped_to != client.expert:
            return 0.0
        return self.now_ms - max(self.swap_began_ms, client.waiting_since_ms)

    def _check_wait(self, client: Client) -> None:
        """Nobody waits longer than it or the settings allow, in whatever way the wait ends."""
        waited_ms, config = self._waited_ms(client), self.rates.config
        late_ms = self.rates.timer_late_ms + 1e-3
        self.expect(
            waited_ms <= client.limit_ms + late_ms, f"{client.id} waits beyond what it allowed"
        )
        if config.queue_wait_ms_max is None:  # for each wait of a request that was taken back
            waited_ms = self.now_ms - client.waiting_since_ms
            bound_ms = config.age_bound_ms + config.drain_deadline_ms + self._own_swap_ms(client)
            self.expect(
                waited_ms <= bound_ms + self.rates.moments_ms,
                f"{client.id} waits beyond age bound, drain deadline and one swap",
            )

    def _check_not_early(self, client: Client) -> None:
        """Whoever is refused in the queue has waited as long as it may."""
        config = self.rates.config
        if self._waited_ms(client) >= client.limit_ms - 1e-6:
            return
        waited_ms = self.now_ms - client.waiting_since_ms
        turn_ms = config.age_bound_ms + config.drain_deadline_ms
        due = config.queue_wait_ms_max is None and waited_ms >= turn_ms - 1e-6
        self.expect(due, f"{client.id} refused before its time")
        self.expect(self.swapping != client.expert, f"{client.id} refused in its own swap")
        self.promises.refused(client)
        self.counts["refused at the bound"] += 1

    def _check_serving(self) -> None:
        mine = sum(self.clients[name].expert == self.resident for name in self.waiting)
        room = self.rates.config.in_flight_max - len(self.running)
        self.expect(not mine or not room, "the resident has room and waiters")
        self.expect(bool(self.running) or not self.waiting, "requests wait before an idle slot")

    def _check_rest(self) -> None:
        self.expect(not self.waiting and not self.running, "work is left at the end")
        ended = sum(self.counts[status.name] for status in Status if status.value > 2)
        self.expect(ended == len(self.clients), "requests without an end")
        self.expect(self.wake is None, "a wake-up is asked for at rest")
        self.expect(
            self.counts["swaps"] <= self.counts["grants"] + len(self.clients), "more swaps than use"
        )

    def _starvation_bound_ms(self, client: Client) -> float:
        """No request waits longer than this, whatever load follows it.

        Until it has aged: the age bound. Then each turn of the slot goes to whoever holds the
        oldest request and serves at least a batch of the oldest, so that only those who are here
        before it can still be turned to before it: their batches, counted per expert, are turns.
        Three more: the turn under way, one chosen by weight just before, one that was retired.
        """
        rates, batch = self.rates, self.rates.config.in_flight_max
        older = Counter(self.clients[name].expert for name in (*self.waiting, *self.running))
        older[client.expert] += 1
        turns = sum(-(-count // batch) for count in older.values()) + 3
        failing = rates.swap_fails_chance > 0 or rates.retirements > 0
        if failing:  # a failed swap takes a turn and gives nothing; each expert may fail again
            turns += len(rates.experts) * 4
        return rates.config.age_bound_ms + turns * rates.turn_ms_max
