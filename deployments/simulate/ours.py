"""Our own policy: the scheduler that hosts run, one per slot, behind the gateway's choice of host.

Nothing of it is written again here: ``Scheduler`` decides at the slot, ``choose_host`` picks the
slot, ``add_dispatched`` keeps the gateway's picture honest between two listings of the registry.
The picture is as old here as it may be in operation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from deployments.choose_host import choose_host
from deployments.host_directory import add_dispatched
from deployments.host_record import HostRecord
from deployments.simulate.floor import Floor, RuleBroken, Slot
from deployments.simulate.job import Job
from deployments.swap.config import SchedulerConfig
from deployments.swap.core import Scheduler
from deployments.swap.effects import AbortInFlight, BeginSwap, Effect, Grant, Refuse, WakeAt

__all__ = ["LISTING_MS", "Ours", "scheduler_config"]

LISTING_MS = 500.0  # HostDirectory's pause between two listings
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

    def __init__(self, floor: Floor, listing_ms: float = LISTING_MS) -> None:
        self.floor = floor
        self.config = scheduler_config(floor)
        self.schedulers = [Scheduler(self.config, floor.experts) for _ in floor.slots]
        self._jobs: dict[str, Job] = {}
        self._at: dict[str, int] = {}
        self._listing_ms = listing_ms
        self._listed: list[HostRecord] = []
        self._listed_at_ms = float("-inf")
        self._dispatched: dict[int, Counter[str]] = {}

    def arrived(self, job: Job) -> None:
        self._jobs[job.id] = job
        number = self._choose(job.expert)
        self._at[job.id] = number
        scheduler = self.schedulers[number]
        self._do(number, scheduler.arrive(job.id, job.expert, now_ms=self.floor.now_ms))

    def first_token(self, job: Job) -> None:
        if not self.schedulers[job.slot].first_token(job.id):
            raise RuleBroken(f"{job.id} was aborted and runs on")

    def finished(self, job: Job) -> None:
        self._forget(job.id)
        self._do(job.slot, self.schedulers[job.slot].finish(job.id, self.floor.now_ms))

    def swapped(self, slot: Slot) -> None:
        assert slot.resident is not None
        scheduler = self.schedulers[slot.number]
        self._do(slot.number, scheduler.swap_done(slot.resident, self.floor.now_ms, slot.swap_ms))

    def left(self, job: Job) -> None:
        number = self._forget(job.id)
        self._do(number, self.schedulers[number].cancel(job.id, self.floor.now_ms))

    def woken(self, key: int) -> None:
        self._do(key, self.schedulers[key].tick(self.floor.now_ms))

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

    def _abort(self, number: int, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self.floor.stop(self._jobs[request_id])
            self._do(number, self.schedulers[number].requeue(request_id, self.floor.now_ms))

    def _forget(self, request_id: str) -> int:
        del self._jobs[request_id]
        return self._at.pop(request_id)

    # --- choice of host --------------------------------------------------------------------------

    def _choose(self, expert: str) -> int:
        now_ms = self.floor.now_ms
        if now_ms - self._listed_at_ms >= self._listing_ms:
            self._listed = [self._record(number) for number in range(len(self.schedulers))]
            self._listed_at_ms = now_ms
            self._dispatched.clear()
        seen = [self._with_dispatched(n, record) for n, record in enumerate(self._listed)]
        chosen = choose_host(seen, expert, now_ms)
        assert chosen is not None  # every slot serves every expert
        number = int(chosen.host_id)
        self._dispatched.setdefault(number, Counter())[expert] += 1
        return number

    def _with_dispatched(self, number: int, record: HostRecord) -> HostRecord:
        sent = self._dispatched.get(number)
        return add_dispatched(record, sent) if sent else record

    def _record(self, number: int) -> HostRecord:
        """As ``ExpertHost.record`` makes it."""
        snapshot = self.schedulers[number].snapshot()
        return HostRecord(
            host_id=f"{number:04d}",
            url="",
            experts=self.floor.experts,
            resident=snapshot.resident,
            queue_depths=snapshot.queued,
            in_flight=snapshot.in_flight,
            swap_ms=snapshot.swap_ms,
            out_of_service=snapshot.out_of_service,
            slot_state=snapshot.phase.value,
            heartbeat_ms=int(self.floor.now_ms),
            queued_request_ms=(snapshot.service_ms or 0.0) / snapshot.in_flight_max,
        )
