"""What the scheduler asks its caller to do, and what it shows of itself.

Effects are to be carried out in the order in which they are returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from deployments.swap.states import SlotPhase

__all__ = [
    "AbortInFlight",
    "BeginSwap",
    "Effect",
    "Grant",
    "Refusal",
    "Refuse",
    "SlotSnapshot",
    "WakeAt",
]


class Refusal(StrEnum):
    """Why a request was turned away."""

    QUEUE_FULL = "queue_full"
    DEADLINE = "deadline"
    OUT_OF_SERVICE = "out_of_service"


@dataclass(frozen=True, slots=True)
class Grant:
    """Run this request now: its expert is resident and stays so until the request ends."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """The request is over. ``wait_ms``: the wait it faced, by measurement (infinite when its expert
    is out of service). ``limit_ms``: what it allowed. ``retry_ms``: after how long a wait of the
    same request would probably fit into that. ``depth``: requests waiting. ``detail``: why the
    expert is out of service, else empty.
    """

    request_id: str
    expert: str
    reason: Refusal
    wait_ms: float
    limit_ms: float
    depth: int
    detail: str = ""
    retry_ms: float | None = None


@dataclass(frozen=True, slots=True)
class BeginSwap:
    """Make this expert resident; answer with ``swap_done`` or ``swap_failed``, exactly once."""

    expert: str


@dataclass(frozen=True, slots=True)
class AbortInFlight:
    """Stop these requests, none of which has sent anything; answer each with ``requeue``,
    ``cancel`` or ``finish`` once it no longer runs on the device.
    """

    request_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Call ``tick`` at this time. Replaces every earlier one; None: no wake-up is needed."""

    at_ms: float | None


Effect = Grant | Refuse | BeginSwap | AbortInFlight | WakeAt


@dataclass(frozen=True, slots=True)
class SlotSnapshot:
    """The slot at one instant, for the registry.

    ``resident`` is None while the slot is empty or swapping. ``target`` is where a drain or swap
    leads. ``queued`` lists only experts with somebody waiting; ``swap_ms`` only measured experts;
    ``out_of_service`` maps an expert to the reason.
    """

    phase: SlotPhase
    resident: str | None
    target: str | None
    queued: Mapping[str, int]
    in_flight: int
    in_flight_max: int
    swap_ms: Mapping[str, float]
    service_ms: float | None
    out_of_service: Mapping[str, str]
