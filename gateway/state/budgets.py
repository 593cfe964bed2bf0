"""The budget ledger: money is reserved before it is spent, and settled to what it really was.

Each method is one Lua script, so any number of gateways share a budget without overspending it. The
key layout and the invariants stand at the head of ``reserve.lua``. All amounts are integer
micro-dollars.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from deployments.store import StateStore, load_script
from experts.errors import BudgetExceeded

AMOUNT_MAX_MICRO_USD = 2**53 - 1  # Lua's numbers are exact up to here: nine billion dollars
_SCOPE_CHARS_MAX = 256


class Settlement(StrEnum):
    """What became of a reservation."""

    SETTLED = "settled"
    LATE = "late"  # its lease had expired; charged all the same
    UNKNOWN = "unknown"  # settled before, or never made; nothing charged


@dataclass(frozen=True, slots=True)
class Balance:
    """Micro-dollars of one scope in the present window."""

    spent: int
    reserved: int


class BudgetLedger:
    """Budgets by scope. Every method raises StateUnavailable when the store is away.

    ``now_ms`` (milliseconds since the epoch) may be given where time must be reproducible; left
    out, the store's own clock counts, so that the clocks of several gateways need not agree.
    """

    def __init__(self, store: StateStore) -> None:
        self._store = store
        for name in ("reserve", "settle", "balance"):
            store.add_script(f"budget_{name}", load_script("gateway.state", f"{name}.lua"))

    async def reserve(
        self,
        scope: str,
        amount: int,
        limit: int,
        reservation_id: str,
        lease_ms: int,
        now_ms: int | None = None,
        *,
        window_ms: int = 0,
    ) -> None:
        """Set ``amount`` aside until it is settled or ``lease_ms`` have passed.

        ``limit`` holds per window of ``window_ms`` (aligned to the epoch), or for ever when that is
        0; another ``window_ms`` than before starts anew. Reserving again under the same id replaces
        the amount and renews the lease. Raises BudgetExceeded when spent, reserved and ``amount``
        together would exceed ``limit``.
        """
        _check_amounts(amount=amount, limit=limit)
        if lease_ms <= 0 or window_ms < 0:
            raise ValueError(f"lease_ms={lease_ms}, window_ms={window_ms}")
        granted, left = await self._store.eval_script(
            "budget_reserve",
            self._keys(scope),
            [reservation_id, amount, limit, lease_ms, window_ms, _time(now_ms)],
        )
        if not granted:
            raise BudgetExceeded(scope, needed_micro_usd=amount, left_micro_usd=max(0, left))

    async def settle(self, scope: str, reservation_id: str, actual: int) -> Settlement:
        """Charge ``actual`` instead of what was reserved; 0 gives it all back. Idempotent.

        ``actual`` is charged in full even when more than was reserved: it has been spent.
        """
        _check_amounts(actual=actual)
        reply = await self._store.eval_script(
            "budget_settle", self._keys(scope), [reservation_id, actual]
        )
        return Settlement(reply.decode())

    async def balance(self, scope: str, now_ms: int | None = None) -> Balance:
        """Spent and reserved at this moment."""
        spent, reserved = await self._store.eval_script(
            "budget_balance", self._keys(scope)[:3], [_time(now_ms)]
        )
        return Balance(spent, reserved)

    async def spent(self, scope: str, now_ms: int | None = None) -> int:
        """Micro-dollars settled in the present window."""
        return (await self.balance(scope, now_ms)).spent

    def _keys(self, scope: str) -> list[str]:
        if not 0 < len(scope) <= _SCOPE_CHARS_MAX:
            raise ValueError(f"a scope has 1 to {_SCOPE_CHARS_MAX} characters")
        tag = f"{{{scope}}}"  # one hash slot per scope
        return [
            self._store.key("budget", tag, part)
            for part in ("totals", "amounts", "leases", "expired")
        ]


def _time(now_ms: int | None) -> int | str:
    return "" if now_ms is None else now_ms


def _check_amounts(**amounts: int) -> None:
    for name, value in amounts.items():
        if not 0 <= value <= AMOUNT_MAX_MICRO_USD:
            raise ValueError(f"{name}={value} is not within 0..{AMOUNT_MAX_MICRO_USD}")
