"""What the gateway knows of the slots, and when it comes to know it.

As in operation: a host writes its record every ``HEARTBEAT_MS``, and ``CHANGE_MS`` after its phase
or its resident changed; the gateway lists all records every ``LISTING_MS`` and adds what it sent
since a host's last heartbeat. So the picture is up to 200 ms old, and wrong in the ways in which
the real one is wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence

from deployments.choose_host import choose_host, idle_host_for, is_idle
from deployments.host_directory import add_dispatched
from deployments.host_record import HostRecord, PoolRecord
from deployments.swap.core import Scheduler

__all__ = ["CHANGE_MS", "HEARTBEAT_MS", "LISTING_MS", "GatewayView"]

HEARTBEAT_MS = 100.0  # deployments.host.HEARTBEAT_MS
CHANGE_MS = 20.0  # the pause in which a host gathers changes before it writes them
LISTING_MS = 100.0  # HostDirectory's pause between two listings


class GatewayView:
    """Single owner of the picture. ``touch`` has to be called before, and ``note`` after, whatever
    changes a scheduler; that is enough to know every record as it was when it was written.
    ``take_listing`` has to be called every ``LISTING_MS``. ``in_memory``: the experts in the host
    memory of a slot's node, of which records then tell; ``load_ms``: what reading another takes.
    """

    def __init__(
        self,
        schedulers: Sequence[Scheduler],
        experts: Sequence[str],
        *,
        in_memory: Callable[[int], Collection[str]] | None = None,
        load_ms: float = 0.0,
    ) -> None:
        self._schedulers = schedulers
        self._in_memory = in_memory
        self._load_ms = load_ms
        self._served: list[tuple[str, ...]] = [tuple(experts) for _ in schedulers]
        self._shown = [scheduler.visible_state() for scheduler in schedulers]
        self._due_ms = [HEARTBEAT_MS] * len(schedulers)
        self._written = [self._record(number, 0.0) for number in range(len(schedulers))]
        self._listed = list(self._written)
        self._dispatched: dict[int, Counter[str]] = {}

    def place(self, number: int, experts: Sequence[str]) -> None:
        """Which experts the slot's host serves from now on."""
        self._served[number] = tuple(experts)

    def touch(self, number: int, now_ms: float) -> None:
        """Nothing has happened at this slot since the last ``note``: write what fell due since."""
        if now_ms < self._due_ms[number]:
            return
        due_ms = self._due_ms[number]
        beats = int((now_ms - due_ms) / HEARTBEAT_MS)
        at_ms = due_ms + beats * HEARTBEAT_MS
        self._written[number] = self._record(number, at_ms)
        self._due_ms[number] = at_ms + HEARTBEAT_MS

    def note(self, number: int, now_ms: float) -> None:
        """Something has happened at this slot."""
        shown = self._schedulers[number].visible_state()
        if shown != self._shown[number]:
            self._shown[number] = shown
            self._due_ms[number] = min(self._due_ms[number], now_ms + CHANGE_MS)

    def choose(self, expert: str, now_ms: float, *, exclude: Collection[int] = ()) -> int:
        """The slot to which the gateway sends a request now, one that comes or one that moves."""
        seen = [record for n, record in enumerate(self._seen()) if n not in exclude]
        chosen = choose_host(seen, expert, now_ms)
        if chosen is None:
            raise LookupError(f"no slot serves {expert}")
        number = int(chosen.host_id)
        self._dispatched.setdefault(number, Counter())[expert] += 1
        return number

    def idle_slot_for(self, number: int, expert: str, now_ms: float) -> bool:
        """Whether requests that wait at this slot for the expert should move."""
        here = self._listed[number].host_id
        return idle_host_for(self._seen(), here, expert, now_ms) is not None

    def _seen(self) -> list[HostRecord]:
        return [self._with_dispatched(n, record) for n, record in enumerate(self._listed)]

    def take_listing(self, now_ms: float) -> bool:
        """Take note of what the hosts have written; whether any of them is idle."""
        for number, before in enumerate(self._listed):
            self.touch(number, now_ms)
            record = self._listed[number] = self._written[number]
            if record.heartbeat_ms != before.heartbeat_ms:
                self._dispatched.pop(number, None)
        return any(is_idle(record) for record in self._listed)

    def _with_dispatched(self, number: int, record: HostRecord) -> HostRecord:
        sent = self._dispatched.get(number)
        return add_dispatched(record, sent) if sent else record

    def _record(self, number: int, at_ms: float) -> HostRecord:
        """As ``ExpertHost.record`` makes it."""
        snapshot = self._schedulers[number].snapshot()
        return HostRecord(
            host_id=f"{number:04d}",
            url="",
            experts=self._served[number],
            resident=snapshot.resident,
            queue_depths=snapshot.queued,
            in_flight=snapshot.in_flight,
            swap_ms=snapshot.swap_ms,
            out_of_service=snapshot.out_of_service,
            slot_state=snapshot.phase.value,
            heartbeat_ms=int(at_ms),
            queued_request_ms=(snapshot.service_ms or 0.0) / snapshot.in_flight_max,
            pools=self._pools(number),
            load_ms=self._load_ms,
        )

    def _pools(self, number: int) -> tuple[PoolRecord, ...]:
        if self._in_memory is None:
            return ()
        return (PoolRecord("", 0, 0, self._served[number], tuple(self._in_memory(number))),)
