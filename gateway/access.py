"""The gate before the experts: who asks, is it within the key's limits, and what did it really use.

A request of a key is admitted once, in one atomic step, and settled once, on every way out. What
was admitted by a gateway that died is released when its lease ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from experts.errors import AuthenticationFailed, StateUnavailable
from gateway.journal import Admission, Decision, Journal
from gateway.key_lookup import KeyLookup
from gateway.keys import Access, Admitted, digest_of, looks_like_a_key
from gateway.state.keys import REVOKED_KEY, UNKNOWN_KEY, KeyLedger, Order, Refused
from gateway.wire import WireRequest

__all__ = ["AccessControl", "Gate", "OpenGate", "worst_case_order"]

log = logging.getLogger(__name__)

_NO_KEY = "This gateway needs an API key."
_LEASE_MARGIN_MS = 30_000  # deciding, queueing at the door, writing to a slow client
_BACKLOG_MAX = 10_000
# At a time. In a burst the others wait here, where no time is running: handing the store all of
# them at once would let its patience run out on the way, and it would count as away.
_STORE_CALLS_MAX = 32
_RETRY_S = 0.5


class Gate(Protocol):
    """What the service asks of this module."""

    async def authenticate(self, secret: str | None) -> Access: ...

    async def admit(self, journal: Journal, request: WireRequest, decision: Decision) -> None: ...

    async def settle(self, journal: Journal) -> None: ...

    def close(self, journal: Journal) -> None: ...


class OpenGate:
    """No keys at all: everybody may ask, nobody is charged."""

    async def authenticate(self, secret: str | None) -> Access:
        return Access()

    async def admit(self, journal: Journal, request: WireRequest, decision: Decision) -> None:
        return None

    async def settle(self, journal: Journal) -> None:
        return None

    def close(self, journal: Journal) -> None:
        return None


def worst_case_order(request: WireRequest, decision: Decision, request_timeout_ms: float) -> Order:
    """What a plan asks of its key when every stage runs to its last token. Pure."""
    plan = decision.plan
    stages = len(plan.stages)
    per_stage = decision.prompt_tokens + decision.max_output_tokens * request.choices
    longest_ms = min(plan.caps.deadline_ms, stages * request_timeout_ms)
    return Order(
        amount_micro_usd=plan.worst_case_micro_usd,
        tokens=plan.answers_max * per_stage,
        lease_ms=int(longest_ms) + _LEASE_MARGIN_MS,
        policy=decision.asked_policy,
        named=decision.named_expert,
        experts=tuple(stage.expert for stage in plan.stages),
    )


@dataclass(frozen=True, slots=True)
class _Bill:
    """A settlement to be made."""

    digest: str
    admission_id: str
    spent_micro_usd: int
    tokens: int


class AccessControl:
    """Keys from a store. Its owner is one event loop.

    ``require_keys`` False lets requests without a key pass unlimited; a key that is sent and exists
    counts all the same.
    """

    def __init__(
        self,
        keys: KeyLookup,
        ledger: KeyLedger,
        *,
        require_keys: bool,
        request_timeout_ms: float,
    ) -> None:
        self._keys = keys
        self._ledger = ledger
        self._require_keys = require_keys
        self._request_timeout_ms = request_timeout_ms
        self._turns = asyncio.Semaphore(_STORE_CALLS_MAX)
        self._settling: set[asyncio.Task[None]] = set()
        self._backlog: deque[_Bill] = deque()
        self._retrying: asyncio.Task[None] | None = None
        self.lost_settlements = 0

    @property
    def waiting_settlements(self) -> int:
        """Settlements that the store has not taken yet."""
        return len(self._backlog)

    async def authenticate(self, secret: str | None) -> Access:
        """Who asks. Raises AuthenticationFailed; an outage of the store is the policy's to judge.

        What cannot be a key of ours ("unused", another provider's) is not looked up.
        """
        if secret is None or not looks_like_a_key(secret):
            if self._require_keys:
                raise AuthenticationFailed(_NO_KEY if secret is None else UNKNOWN_KEY)
            return Access()
        try:
            async with self._turns:
                record = await self._keys.find(digest_of(secret))
        except StateUnavailable:
            return Access(unverified=True)
        if record is None:
            if self._require_keys:
                raise AuthenticationFailed(UNKNOWN_KEY)
            return Access()
        if record.revoked_ms is not None:
            raise AuthenticationFailed(REVOKED_KEY)
        return Access(record)

    async def admit(self, journal: Journal, request: WireRequest, decision: Decision) -> None:
        """Set the request's worst case aside under its key; nothing for a request without one.

        Raises AuthenticationFailed, ScopeDenied, BudgetExceeded, RateLimited; StateUnavailable
        unless the policy lets requests through while the store is away.
        """
        key = journal.access.key
        if key is None:
            return
        order = worst_case_order(request, decision, self._request_timeout_ms)
        asking = asyncio.ensure_future(self._ask(key.digest, journal.decision_id, order))
        # Noted before the answer is known: whoever is cancelled meanwhile may have been admitted.
        journal.admission = Admission(journal.decision_id, key.digest, asking)
        try:
            answer = await asyncio.shield(asking)
        except StateUnavailable:
            if decision.limits_fail_open:
                return
            raise
        journal.rates = answer.rates
        if isinstance(answer, Refused):
            journal.admission = None
            raise answer.error

    async def _ask(self, digest: str, admission_id: str, order: Order) -> Admitted | Refused:
        async with self._turns:
            return await self._ledger.admit(digest, admission_id, order)

    async def settle(self, journal: Journal) -> None:
        """Settle now, before the answer's last byte, so that the next request finds the place free.

        Waits for the store at most once; being cancelled does not stop the settlement.
        """
        if (task := self._begin(journal)) is not None:
            await asyncio.shield(task)

    def close(self, journal: Journal) -> None:
        """Settle what is not settled yet, in the background. Idempotent, never waits."""
        self._begin(journal)

    async def aclose(self, flush_ms: float = 1_000) -> None:
        """Finish the settlements under way, for at most ``flush_ms``."""
        try:
            async with asyncio.timeout(flush_ms / 1000):
                if self._settling:
                    await asyncio.wait(set(self._settling))
                while self._backlog:
                    await self._retry_oldest()
        except (StateUnavailable, TimeoutError):
            pass
        if self._retrying is not None:
            self._retrying.cancel()
            await asyncio.gather(self._retrying, return_exceptions=True)
        if self._backlog:
            owed = sum(bill.spent_micro_usd for bill in self._backlog)
            log.error("%d settlements (%d micro-USD) were not written", len(self._backlog), owed)

    def _begin(self, journal: Journal) -> asyncio.Task[None] | None:
        admission, journal.admission = journal.admission, None
        if admission is None:
            return None
        usage = journal.usage
        bill = _Bill(
            admission.digest,
            admission.id,
            journal.spent_micro_usd,
            usage.input_tokens + usage.output_tokens,
        )
        task = asyncio.ensure_future(self._settle(admission, bill))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return task

    async def _settle(self, admission: Admission, bill: _Bill) -> None:
        await asyncio.wait({admission.asking})  # a settlement must not overtake its admission
        admitted = admission.asking.exception() is None
        try:
            await self._write(bill)
        except StateUnavailable:
            if admitted:  # else there is most likely nothing to settle, and its lease will end
                self._postpone(bill)

    async def _write(self, bill: _Bill) -> None:
        async with self._turns:
            await self._ledger.settle(
                bill.digest, bill.admission_id, bill.spent_micro_usd, bill.tokens
            )

    def _postpone(self, bill: _Bill) -> None:
        if len(self._backlog) >= _BACKLOG_MAX:
            self._backlog.popleft()
            self.lost_settlements += 1
        self._backlog.append(bill)
        if self._retrying is None or self._retrying.done():
            self._retrying = asyncio.ensure_future(self._retry_all())

    async def _retry_all(self) -> None:
        """Until nothing waits. Settling is idempotent, so an answer that was lost does no harm."""
        while self._backlog:
            try:
                await self._retry_oldest()
            except StateUnavailable:
                await asyncio.sleep(_RETRY_S)

    async def _retry_oldest(self) -> None:
        bill = self._backlog[0]
        await self._write(bill)
        if self._backlog and self._backlog[0] is bill:  # it may have been dropped meanwhile
            self._backlog.popleft()
