"""Which host should run a request for an expert: pure, over the hosts' own records.

The measure is latency added, to this request and to others. A request for an expert that is
resident waits for those before it. One whose expert is already queued at a host waits for a swap
that will happen anyway. One that would start a new swap waits for it, and everybody whom the host
serves now waits as long: its swap counts once for the request itself and once for each request that
runs or waits there for another expert. That keeps work for one expert together until a queue has
grown longer than a second copy costs, and new experts away from busy hosts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from deployments.host_record import DRAINING, EMPTY, SERVING, HostRecord

UNMEASURED_SWAP_MS = 5_000.0  # until any host has measured any swap; pessimistic on purpose
UNMEASURED_LOAD_MS = 5_000.0  # from disk to host memory, until the host has measured one
UNMEASURED_REQUEST_MS = 50.0  # delay per waiting request until a host has measured it
OUTDATED_RECORD_MS = 10_000  # beyond any skew of clocks that time synchronisation leaves

MOVES_MAX = 2
"""How often a waiting request may be sent on to an idle host: gateways that see the same idle host
all send to it, and who comes late there waits again."""


def choose_host(records: Iterable[HostRecord], expert: str, now_ms: float) -> HostRecord | None:
    """The host with the least added latency, or None when none serves the expert.

    ``now_ms`` is wall-clock time. A host not heard of for ``OUTDATED_RECORD_MS`` is chosen only
    when there is no other. Among equals the resident wins, then fewer requests in flight, then the
    lower id.
    """
    candidates = [record for record in records if record.serves(expert)]
    if len(candidates) < 2:  # nothing to rank, on the way of every request of a small cluster
        return candidates[0] if candidates else None
    unmeasured_ms = unmeasured_swap_ms(candidates)
    return min(candidates, key=lambda record: _rank(record, expert, now_ms, unmeasured_ms))


def unmeasured_swap_ms(records: Iterable[HostRecord]) -> float:
    """What to take for a swap on a host that has measured none: the slowest of any host.

    A host that has not swapped yet must not look worse than one that has, or it never will.
    """
    measured = [ms for record in records for ms in record.swap_ms.values()]
    return max(measured, default=UNMEASURED_SWAP_MS)


def expected_wait_ms(
    record: HostRecord, expert: str, unmeasured_ms: float = UNMEASURED_SWAP_MS
) -> float:
    """Time until the host would start this request. Infinite for an expert it does not serve."""
    if not record.serves(expert):
        return float("inf")
    own_ms = record.queue_depths.get(expert, 0) * _request_ms(record)
    if is_resident(record, expert):
        return own_ms
    others = [e for e, depth in record.queue_depths.items() if depth > 0 and e != expert]
    others_ms = sum(record.queue_depths[e] for e in others) * _request_ms(record)
    swaps_ms = sum(swap_ms(record, e, unmeasured_ms) for e in others if not is_resident(record, e))
    return swap_ms(record, expert, unmeasured_ms) + own_ms + others_ms + swaps_ms


def added_latency_ms(
    record: HostRecord, expert: str, unmeasured_ms: float = UNMEASURED_SWAP_MS
) -> float:
    """``expected_wait_ms``, plus the swap for everybody at the host if this request causes it."""
    wait_ms = expected_wait_ms(record, expert, unmeasured_ms)
    if is_resident(record, expert) or record.queue_depths.get(expert, 0) > 0:
        return wait_ms
    delayed = record.in_flight + sum(record.queue_depths.values())
    return wait_ms + swap_ms(record, expert, unmeasured_ms) * (1 + delayed)


def is_resident(record: HostRecord, expert: str) -> bool:
    """Whether requests for the expert can start at once: a slot that drains takes no new ones."""
    return record.resident == expert and record.slot_state == SERVING


def swap_ms(record: HostRecord, expert: str, unmeasured_ms: float = UNMEASURED_SWAP_MS) -> float:
    """Measured, else the slowest swap measured on this host, else ``unmeasured_ms``.

    Weights that are not in the host's memory have to be read from disk first. A measured swap may
    include that or not, so it is the greater of the two.
    """
    measured = record.swap_ms.get(expert)
    if measured is None:
        measured = max(record.swap_ms.values(), default=unmeasured_ms)
    if record.reads_disk_for(expert):
        return max(measured, record.load_ms or UNMEASURED_LOAD_MS)
    return measured


def _request_ms(record: HostRecord) -> float:
    return record.queued_request_ms or UNMEASURED_REQUEST_MS


def _is_outdated(record: HostRecord, now_ms: float) -> bool:
    return now_ms - record.heartbeat_ms > OUTDATED_RECORD_MS


def _rank(
    record: HostRecord, expert: str, now_ms: float, unmeasured_ms: float
) -> tuple[bool, float, bool, int, str]:
    return (
        _is_outdated(record, now_ms),
        added_latency_ms(record, expert, unmeasured_ms),
        not is_resident(record, expert),
        record.in_flight,
        record.host_id,
    )


def idle_host_for(
    records: Iterable[HostRecord], host_id: str, expert: str, now_ms: float
) -> HostRecord | None:
    """Where requests should go that wait at ``host_id`` for an expert that is not resident there:
    an idle host, if there is one; else None.

    The request needs one swap at either host. At the busy one that swap comes after a drain and
    holds up the resident's requests; at the idle one it begins now and delays nobody. A host that
    would have to read the weights from disk does not count: the busy one may be reading them
    already. Nor does one whose swap is so much slower that waiting is better; a busy slot stays at
    least for what another turn costs, so its own wait is taken twice.
    """
    known = {record.host_id: record for record in records if record.serves(expert)}
    here = known.get(host_id)
    if here is None or not _waits_behind_others(here, expert):
        return None
    unmeasured_ms = unmeasured_swap_ms(known.values())
    idle = (
        record
        for record in known.values()
        if is_idle(record)
        and not record.reads_disk_for(expert)
        and not _is_outdated(record, now_ms)
    )
    waits = [(expected_wait_ms(r, expert, unmeasured_ms), r.host_id) for r in idle]
    wait_ms, best = min(waits, default=(math.inf, ""))
    if wait_ms > 2 * expected_wait_ms(here, expert, unmeasured_ms):
        return None
    return known.get(best)


def is_idle(record: HostRecord) -> bool:
    """Whether nothing runs or waits at the host, so that a swap there can begin at once."""
    at_rest = record.slot_state in (SERVING, EMPTY)
    return at_rest and record.in_flight == 0 and not any(record.queue_depths.values())


def _waits_behind_others(record: HostRecord, expert: str) -> bool:
    """Whether requests for the expert wait here, all of them, for another expert's to end. While a
    swap runs it may be theirs, and while their own expert drains some of them run: that is no."""
    busy = record.in_flight > 0 and record.slot_state in (SERVING, DRAINING)
    return busy and record.resident != expert and record.queue_depths.get(expert, 0) > 0
