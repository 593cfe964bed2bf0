"""What the admin API looks at and changes, as it is handed in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from deployments.host_record import HostRecord
from experts.catalogue import Catalogue
from gateway.app import Readiness
from gateway.metrics import Metrics
from gateway.state.breakers import TargetView
from gateway.state.decisions import DecisionLog
from gateway.state.keys import KeyLedger, KeyStore
from gateway.state.moves import MoveLog
from gateway.state.policies import PolicyFollower, PolicyStore
from policies.live import PolicyWatcher

__all__ = ["AdminParts", "Hosts", "Tripped"]


class Hosts(Protocol):
    """The known hosts; ``deployments.host_directory.HostDirectory`` is one."""

    @property
    def records(self) -> list[HostRecord]: ...

    @property
    def stale(self) -> bool: ...


class Tripped(Protocol):
    """Breakers that are not closed; ``gateway.state.breakers.BreakerBoard`` is one."""

    def tripped(self) -> Mapping[str, TargetView]: ...


@dataclass(frozen=True, slots=True)
class AdminParts:
    """``wall_ms``: milliseconds since the epoch. ``random_bytes(n)`` makes the keys' secrets."""

    catalogue: Catalogue
    keys: KeyStore
    ledger: KeyLedger
    decisions: DecisionLog
    policies: PolicyWatcher
    policy_store: PolicyStore
    follower: PolicyFollower
    hosts: Hosts
    moves: MoveLog
    breakers: Tripped
    metrics: Metrics
    readiness: Callable[[], Awaitable[Readiness]]
    wall_ms: Callable[[], int]
    random_bytes: Callable[[int], bytes]
