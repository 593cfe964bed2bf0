"""Our own policy: the scheduler that hosts run, one per slot, behind the gateway's choice of host.

Nothing of it is written again here: ``Scheduler`` decides at the slot, ``choose_host`` picks the
slot from what the gateway knows (``gateway_view``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from deployments.choose_host import MOVES_MAX
from deployments.simulate.floor import Floor, RuleBroken, Slot
from deployments.simulate.gateway_view import LISTING_MS, GatewayView
from deployments.simulate.job import Job
from deployments.simulate.node_placement import MOVE_MS, NodePlacement
from deployments.swap.config import SchedulerConfig
from deployments.swap.core import Scheduler
from deployments.swap.effects import AbortInFlight, BeginSwap, Effect, Grant, Refuse, WakeAt
from deployments.swap.prefetch import next_prefetch

__all__ = ["Ours", "scheduler_config"]

QUEUE_MAX = 1_000_000  # only patience ends a wait here, for every policy alike


def scheduler_config(floor: Floor) -> SchedulerConfig:
    """The cluster's settings (else the shipped ones), with its batch and the replay's patience."""
    return replace(
        floor.cluster.scheduler.config(),
        queue_max=QUEUE_MAX,
        in_flight_max=floor.cluster.engine.in_flight_max,
        queue_wait_ms_max=floor.patience_ms,
    )


class Ours:
    """Carries out the schedulers' effects on the floor, as the driver does on an engine."""

    def __init__(self, floor: Floor) -> None:
        self.floor = floor
        self.config = scheduler_config(floor)
        self.schedulers = [Scheduler(self.config, floor.experts) for _ in floor.slots]
        self._jobs: dict[str, Job] = {}
        self._at: dict[str, int] = {}  # by arrival
        self._moves: Counter[str] = Counter()
        self._short_of_memory = floor.cluster.pooled_max < len(floor.experts)
        self.view = GatewayView(
            self.schedulers,
            floor.experts,
            in_memory=self._pooled if self._short_of_memory else None,
            load_ms=floor.cluster.disk_ms,
        )
        self.placement = NodePlacement(floor, self.view) if floor.nodes > 1 else None
        self._prefetching: set[int] = set()  # nodes
        self._place_next()
        self._look_again()

    def arrived(self, job: Job) -> None:
        self._jobs[job.id] = job
        number = self.view.choose(job.expert, self.floor.now_ms)
        self._at[job.id] = number
        scheduler = self._at_slot(number)
        self._do(number, scheduler.arrive(job.id, job.expert, now_ms=self.floor.now_ms))

    def first_token(self, job: Job) -> None:
        if not self.schedulers[job.slot].first_token(job.id):
            raise RuleBroken(f"{job.id} was aborted and runs on")

    def finished(self, job: Job) -> None:
        self._forget(job.id)
        if self.placement is not None:
            self.placement.served(job.expert, self.floor.now_ms - job.started_ms)
        self._do(job.slot, self._at_slot(job.slot).finish(job.id, self.floor.now_ms))

    def swapped(self, slot: Slot) -> None:
        assert slot.resident is not None
        scheduler = self._at_slot(slot.number)
        self._do(slot.number, scheduler.swap_done(slot.resident, self.floor.now_ms, slot.swap_ms))

    def left(self, job: Job) -> None:
        number = self._forget(job.id)
        self._do(number, self._at_slot(number).cancel(job.id, self.floor.now_ms))

    def woken(self, key: int) -> None:
        if key == len(self.schedulers):
            self._place_next()
            return
        if key == len(self.schedulers) + 1:
            self._look_again()
            self._move_waiting()
            return
        self._do(key, self._at_slot(key).tick(self.floor.now_ms))

    def loaded(self, node: int, expert: str) -> None:
        self._prefetching.discard(node)
        if self.placement is not None:
            self.placement.loaded(node, expert)

    # --- what waits goes to a slot that has fallen idle -------------------------------------------

    def _look_again(self) -> None:
        self.floor.wake(len(self.schedulers) + 1, self.floor.now_ms + LISTING_MS)

    def _move_waiting(self) -> None:
        """As the gateway does at every listing, the oldest first, all of one expert together."""
        if not self.view.take_listing(self.floor.now_ms):
            return
        waiting: dict[tuple[int, str], list[Job]] = {}
        for name, number in self._at.items():
            job = self._jobs[name]
            if job.waiting:
                waiting.setdefault((number, job.expert), []).append(job)
        for (number, expert), jobs in waiting.items():
            movable = [job for job in jobs if self._moves[job.id] < MOVES_MAX]
            if movable and self.view.idle_slot_for(number, expert, self.floor.now_ms):
                for job in movable:
                    self._move(job, number)

    def _move(self, job: Job, number: int) -> None:
        now_ms = self.floor.now_ms
        self._moves[job.id] += 1
        target = self._at[job.id] = self.view.choose(job.expert, now_ms, exclude=(number,))
        self._do(number, self._at_slot(number).cancel(job.id, now_ms))
        self._do(target, self._at_slot(target).arrive(job.id, job.expert, now_ms=now_ms))

    # --- memory ----------------------------------------------------------------------------------

    def _place_next(self) -> None:
        """One move of the placement, every so often."""
        if self.placement is None:
            return
        if self.floor.now_ms > 0.0:
            self.placement.tick(self._in_use())
        self.floor.wake(len(self.schedulers), self.floor.now_ms + MOVE_MS)

    def _pooled(self, number: int) -> frozenset[str]:
        return self.floor.in_memory(self.floor.node_of(self.floor.slots[number]))

    def _in_use(self) -> set[tuple[int, str]]:
        """Nodes and experts that run, wait, or are on their way into an engine there."""
        used: set[tuple[int, str]] = set()
        for slot, scheduler in zip(self.floor.slots, self.schedulers, strict=True):
            snapshot = scheduler.snapshot()
            here = {*snapshot.queued, snapshot.resident, snapshot.target}
            used |= {(self.floor.node_of(slot), expert) for expert in here if expert is not None}
        return used

    def _prefetch(self, slot: Slot) -> None:
        """As the driver does: what is wanted most and lacks, from disk while another one runs."""
        node = self.floor.node_of(slot)
        if node in self._prefetching:
            return
        scheduler = self.schedulers[slot.number]
        in_use = [e for e in (slot.resident, slot.target) if e is not None]
        memory = self.floor.in_memory(node)
        following = next_prefetch(scheduler.wanted(), memory, in_use, slot.target)
        if following and self.floor.load(node, following.expert, following.keep):
            self._prefetching.add(node)

    def _at_slot(self, number: int) -> Scheduler:
        """The slot's scheduler, about to be told something."""
        self.view.touch(number, self.floor.now_ms)
        return self.schedulers[number]

    # --- effects ---------------------------------------------------------------------------------

    def _do(self, number: int, effects: Iterable[Effect]) -> None:
        slot = self.floor.slots[number]
        for effect in effects:
            if isinstance(effect, Grant):
                self.floor.start(slot, self._jobs[effect.request_id])
            elif isinstance(effect, BeginSwap):
                self.floor.swap(slot, effect.expert)
            elif isinstance(effect, Refuse):
                job = self._jobs[effect.request_id]
                self._forget(job.id)
                self.floor.miss(job)
            elif isinstance(effect, WakeAt):
                self.floor.wake(number, effect.at_ms)
            elif isinstance(effect, AbortInFlight):
                self._abort(number, effect.request_ids)
        if self._short_of_memory:
            self._prefetch(slot)
        self.view.note(number, self.floor.now_ms)

    def _abort(self, number: int, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.floor.stop(self._jobs[request_id])
            self._do(number, self.schedulers[number].requeue(request_id, self.floor.now_ms))

    def _forget(self, request_id: str) -> int:
        self._moves.pop(request_id, None)
        del self._jobs[request_id]
        return self._at.pop(request_id)
