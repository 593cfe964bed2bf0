"""First come, first served with least-recently-used residency, as a scheduler of one slot.

The requests' order of arrival is cut into batches of ``batch_max``, and no request of a batch waits
for one of a later batch. Within a batch the resident expert's requests run first, as far as there
is room; then the slot drains and turns to the expert of the batch's oldest request. A batch takes
up newcomers until it has had its number. With one slot the least recently used resident is the only
one, so the victim needs no choice.

``batch_max`` 1 is strict order, what a plain queue before an engine amounts to: nobody passes the
head, and neighbours in the queue that want the same expert run together. A larger one is what a
runtime does that routes a batch of prompts and then runs it expert by expert, hits first
(Samba-CoE, arXiv 2405.07518, which measures batches of 1 and 8); it saves most of the swaps.

It answers the same events with the same effects as ``deployments.swap.core.Scheduler`` and has the
same bounds (``queue_max``, ``in_flight_max``, deadlines), so that driver, engine, swap and canary
are the same code under both. It refuses on a full queue and when patience ends, never by forecast.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

from deployments.swap.config import SchedulerConfig
from deployments.swap.effects import (
    BeginSwap,
    Effect,
    Grant,
    Refusal,
    Refuse,
    SlotSnapshot,
    WakeAt,
)
from deployments.swap.states import SlotPhase


@dataclass(slots=True)
class _Waiter:
    expert: str
    expires_ms: float
    limit_ms: float


class FcfsLru:
    """See the module's docstring. One caller owns an instance, as with ``Scheduler``."""

    def __init__(
        self, config: SchedulerConfig, resident: str | None = None, *, batch_max: int = 1
    ) -> None:
        if config.queue_wait_ms_max is None:
            raise ValueError("an order without an age bound needs queue_wait_ms_max")
        self._config = config
        self._wait_ms_max = config.queue_wait_ms_max
        self._batch_max = batch_max
        self._queue: OrderedDict[str, _Waiter] = OrderedDict()  # who is in no batch yet
        self._batch: OrderedDict[str, _Waiter] = OrderedDict()  # in order of arrival
        self._batched = 0  # how many the batch has taken up
        self._running: dict[str, bool] = {}  # request id -> whether it has sent a token
        self._resident = resident
        self._target: str | None = None
        self._out: dict[str, str] = {}
        self._effects: list[Effect] = []

    # --- events -----------------------------------------------------------------------------------

    def arrive(
        self,
        request_id: str,
        expert: str,
        *,
        now_ms: float,
        priority: int = 0,
        deadline_ms: float | None = None,
    ) -> list[Effect]:
        limit_ms = min(self._wait_ms_max, math.inf if deadline_ms is None else deadline_ms)
        waiter = _Waiter(expert, now_ms + limit_ms, limit_ms)
        if expert in self._out:
            self._refuse(request_id, waiter, Refusal.OUT_OF_SERVICE)
        elif len(self._queue) + len(self._batch) >= self._config.queue_max:
            self._refuse(request_id, waiter, Refusal.QUEUE_FULL)
        else:
            self._queue[request_id] = waiter
        return self._settle(now_ms)

    def cancel(self, request_id: str, now_ms: float) -> list[Effect]:
        self._queue.pop(request_id, None)
        self._batch.pop(request_id, None)
        self._running.pop(request_id, None)
        return self._settle(now_ms)

    def first_token(self, request_id: str) -> bool:
        self._running[request_id] = True
        return True

    def has_sent(self, request_id: str) -> bool:
        return self._running[request_id]

    def finish(self, request_id: str, now_ms: float) -> list[Effect]:
        del self._running[request_id]
        return self._settle(now_ms)

    def requeue(self, request_id: str, now_ms: float) -> list[Effect]:
        raise RuntimeError("this order never aborts, so nothing comes back")

    def swap_done(self, expert: str, now_ms: float, swap_ms: float) -> list[Effect]:
        self._resident, self._target = expert, None
        return self._settle(now_ms)

    def swap_failed(self, expert: str, reason: str, now_ms: float) -> list[Effect]:
        self._target = None
        return self.retire(expert, reason, now_ms)

    def tick(self, now_ms: float) -> list[Effect]:
        return self._settle(now_ms)

    def announce(self, expert: str, now_ms: float) -> list[Effect]:
        return []

    def retire(self, expert: str, reason: str, now_ms: float) -> list[Effect]:
        self._out[expert] = reason
        for line in (self._batch, self._queue):
            for name in [n for n, waiter in line.items() if waiter.expert == expert]:
                self._refuse(name, line.pop(name), Refusal.OUT_OF_SERVICE)
        return self._settle(now_ms)

    def restore(self, expert: str, now_ms: float) -> list[Effect]:
        self._out.pop(expert, None)
        return self._settle(now_ms)

    # --- questions --------------------------------------------------------------------------------

    def expected_wait_ms(self, expert: str, now_ms: float, priority: int = 0) -> float:
        return 0.0

    def snapshot(self) -> SlotSnapshot:
        queued: dict[str, int] = {}
        for waiter in self._waiters():
            queued[waiter.expert] = queued.get(waiter.expert, 0) + 1
        return SlotSnapshot(
            phase=self._phase(),
            resident=self._resident,
            target=self._target,
            queued=queued,
            in_flight=len(self._running),
            in_flight_max=self._config.in_flight_max,
            swap_ms={},
            service_ms=None,
            out_of_service=dict(self._out),
        )

    def visible_state(self) -> tuple[object, ...]:
        return (self._phase(), self._resident, self._target, len(self._out))

    def wanted(self) -> list[str]:
        return list(dict.fromkeys(waiter.expert for waiter in self._waiters()))

    def _phase(self) -> SlotPhase:
        if self._target is not None:
            return SlotPhase.SWAPPING
        return SlotPhase.EMPTY if self._resident is None else SlotPhase.SERVING

    def _waiters(self) -> list[_Waiter]:
        """Oldest first."""
        return [*self._batch.values(), *self._queue.values()]

    # --- settling ---------------------------------------------------------------------------------

    def _settle(self, now_ms: float) -> list[Effect]:
        self._expire(now_ms)
        while self._target is None and self._fill_batch():
            name = self._next_hit()
            if name is None:
                if not self._running:
                    self._begin_swap(next(iter(self._batch.values())).expert)
                break
            if len(self._running) >= self._config.in_flight_max:
                break
            del self._batch[name]
            self._running[name] = False
            self._effects.append(Grant(name))
        next_ms = min((w.expires_ms for w in self._waiters()), default=None)
        self._effects.append(WakeAt(next_ms))
        effects, self._effects = self._effects, []
        return effects

    def _fill_batch(self) -> bool:
        """Take up newcomers as far as the batch may; whether anybody is in it."""
        if not self._batch:
            self._batched = 0
        while self._queue and self._batched < self._batch_max:
            name, waiter = self._queue.popitem(last=False)
            self._batch[name] = waiter
            self._batched += 1
        return bool(self._batch)

    def _next_hit(self) -> str | None:
        """The batch's oldest request for the resident expert."""
        return next((n for n, w in self._batch.items() if w.expert == self._resident), None)

    def _begin_swap(self, expert: str) -> None:
        self._resident, self._target = None, expert
        self._effects.append(BeginSwap(expert))

    def _expire(self, now_ms: float) -> None:
        for line in (self._batch, self._queue):
            for name in [n for n, waiter in line.items() if waiter.expires_ms <= now_ms]:
                self._refuse(name, line.pop(name), Refusal.DEADLINE)

    def _refuse(self, request_id: str, waiter: _Waiter, reason: Refusal) -> None:
        self._effects.append(
            Refuse(
                request_id=request_id,
                expert=waiter.expert,
                reason=reason,
                wait_ms=waiter.limit_ms,
                limit_ms=waiter.limit_ms,
                depth=len(self._queue) + len(self._batch),
                detail=self._out.get(waiter.expert, ""),
            )
        )
