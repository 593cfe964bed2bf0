"""Which backend a call goes to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from deployments.host_record import HostRecord
from experts.errors import (
    CoeError,
    ConnectionPoolFull,
    HostLost,
    HostUnavailable,
    QueueFull,
    UpstreamTimeout,
)
from experts.http_backend import HttpBackend
from experts.protocol import Backend, ExpertCall, ExpertReply
from experts.scripted import ScriptedBackend
from experts.types import Capability, Endpoint, ExpertSpec, Price, SourceKind
from gateway.backends import HOST_BACKENDS_MAX, BackendPool, Lease
from gateway.caller import Caller
from gateway.journal import StageNote


def spec(expert: str, kind: SourceKind = SourceKind.WEIGHTS, location: str = "/x") -> ExpertSpec:
    return ExpertSpec(expert, kind, location, Price(), 1024, frozenset({Capability.CHAT}))


class Directory:
    def __init__(self, *records: HostRecord) -> None:
        self.records = list(records)
        self.suspects: list[tuple[str, float]] = []
        self.dispatched: list[tuple[str, str]] = []

    def hosts_for(self, expert: str) -> list[HostRecord]:
        return [record for record in self.records if record.serves(expert)]

    def mark_suspect(self, host_id: str, until_ms: float) -> None:
        self.suspects.append((host_id, until_ms))

    def note_dispatched(self, host_id: str, expert: str) -> None:
        self.dispatched.append((host_id, expert))


def pool(directory: Directory | None) -> BackendPool:
    return BackendPool(
        directory=directory, host_token=lambda: "t", secret=lambda _: None, wall_ms=lambda: 1_000
    )


def host(host_id: str, resident: str, swap_ms: float = 900.0) -> HostRecord:
    return HostRecord(
        host_id,
        f"http://{host_id}",
        ("a", "b"),
        resident=resident,
        swap_ms={"a": swap_ms, "b": swap_ms},
        heartbeat_ms=1_000,
    )


async def test_the_host_that_holds_the_expert_is_chosen_and_told() -> None:
    directory = Directory(host("one", "b"), host("two", "a"))
    backends = pool(directory)
    lease = backends.lease(spec("a"))
    assert lease.host == "two"
    assert isinstance(lease.backend, HttpBackend)
    assert backends.lease(spec("a")).backend is lease.backend, "one pool per host"
    assert backends.lease(spec("a"), exclude={"two"}).host == "one"
    assert directory.dispatched == [("two", "a"), ("two", "a"), ("one", "a")]
    await backends.aclose()


async def test_candidates_carry_residency_and_the_wait_for_a_swap() -> None:
    backends = pool(Directory(host("one", "b", swap_ms=900.0)))
    here, swapped = backends.candidate(spec("b")), backends.candidate(spec("a"))
    assert (here.resident, here.expected_wait_ms) == (True, 0.0)
    assert (swapped.resident, swapped.expected_wait_ms) == (False, 900.0)
    assert not backends.candidate(spec("nobody")).available
    assert backends.candidate(spec("r", SourceKind.REMOTE, "http://r/v1")).available


async def test_without_a_host_the_error_is_typed() -> None:
    with pytest.raises(HostUnavailable):
        pool(None).lease(spec("a"))


async def test_scripts_run_in_process_once_made() -> None:
    backends = pool(None)
    scripted = spec("s", SourceKind.SCRIPTED, "echo")
    first = backends.lease(scripted).backend
    assert isinstance(first, ScriptedBackend)
    assert backends.lease(scripted).backend is first


async def test_hosts_that_come_and_go_do_not_pile_up() -> None:
    directory = Directory()
    backends = pool(directory)
    for number in range(HOST_BACKENDS_MAX + 20):
        directory.records = [host(f"h{number}", "a")]
        backends.lease(spec("a"))
    assert len(backends._by_host) == HOST_BACKENDS_MAX
    await backends.aclose()


class Failing(Backend):
    def __init__(self, error: CoeError | None) -> None:
        self.error = error

    async def complete(self, call: ExpertCall) -> ExpertReply:
        if self.error is not None:
            raise self.error
        return ExpertReply({"ok": True})

    def stream(self, call: ExpertCall) -> Any:
        raise AssertionError("not streamed here")

    async def aclose(self) -> None:
        return None


class Leases:
    """Hands out hosts in order; each fails as told."""

    def __init__(self, **errors: CoeError | None) -> None:
        self.errors = errors
        self.suspects: list[str] = []
        self.asked: list[str] = []

    def lease(self, wanted: ExpertSpec, *, exclude: Iterable[str] = ()) -> Lease:
        for name, error in self.errors.items():
            if name not in set(exclude):
                self.asked.append(name)
                return Lease(Failing(error), name)
        raise HostUnavailable(wanted.id)

    def suspect(self, name: str) -> None:
        self.suspects.append(name)


async def call_over(leases: Leases) -> dict[str, Any]:
    call = ExpertCall("a", Endpoint.CHAT, {}, "r", 1e3, 1e3, 1e3)
    return (await Caller(leases).complete(spec("a"), call, StageNote("a", 0.0))).body


async def test_a_lost_host_is_suspected_and_the_next_one_asked() -> None:
    leases = Leases(one=HostLost("a", "one"), two=UpstreamTimeout("a", "connect", 5.0), three=None)
    assert await call_over(leases) == {"ok": True}
    assert leases.suspects == ["one", "two"]


@pytest.mark.parametrize("full", [QueueFull("a", 9, 1.0), ConnectionPoolFull("a", 9, 1.0)])
async def test_a_full_host_is_not_suspected(full: CoeError) -> None:
    leases = Leases(one=full, two=None)
    assert await call_over(leases) == {"ok": True}
    assert leases.suspects == []


async def test_a_timeout_at_work_is_not_paid_for_twice() -> None:
    leases = Leases(one=UpstreamTimeout("a", "total", 5.0), two=None)
    with pytest.raises(UpstreamTimeout):
        await call_over(leases)
    assert leases.asked == ["one"]


async def test_the_number_of_hosts_tried_is_bounded() -> None:
    leases = Leases(**{f"h{n}": HostLost("a", f"h{n}") for n in range(9)})
    with pytest.raises(HostLost):
        await call_over(leases)
    assert len(leases.asked) == 3


async def test_the_last_host_s_error_is_told_not_that_none_is_left() -> None:
    with pytest.raises(QueueFull):
        await call_over(Leases(one=QueueFull("a", 9, 1.0)))
