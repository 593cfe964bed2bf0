"""API keys in the state store: their records, and the ledger every request of a key goes through.

``KeyStore`` is for those who manage keys and for looking one up; ``KeyLedger`` admits and settles,
each in one atomic script, so any number of gateways share a key's limits without exceeding them.
The layout and the invariants stand at the head of ``key_common.lua``. All of it runs on the store's
own clock; ``now_ms`` (since the epoch) is for tests. Every method raises StateUnavailable when the
store is away.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from deployments.store import Argument, StateStore, load_script
from experts.errors import (
    AuthenticationFailed,
    BudgetExceeded,
    CoeError,
    RateLimited,
    ScopeDenied,
)
from gateway.keys import (
    BUDGET_MAX_MICRO_USD,
    Admitted,
    KeyBudgets,
    KeyLimits,
    KeyRecord,
    KeyScope,
    RateState,
    key_id,
)

__all__ = [
    "KEYS_MAX",
    "KeyLedger",
    "KeyStore",
    "KeyTaken",
    "KeyUsage",
    "Order",
    "Refused",
    "Settlement",
]

KEYS_MAX = 100_000
UNKNOWN_KEY = "This API key is not known here."
REVOKED_KEY = "This API key has been revoked."

_PACKAGE = "gateway.state"
_BUCKETS = ("requests", "tokens")


# --- records -------------------------------------------------------------------------------------


class KeyTaken(ValueError):
    """The id exists already, or there are KEYS_MAX keys."""


class KeyStore:
    """Creates, finds, lists and revokes keys."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        for name in ("create", "revoke"):
            store.add_script(f"key_{name}", load_script(_PACKAGE, f"key_{name}.lua"))

    async def create(
        self, digest: str, name: str, scope: KeyScope, limits: KeyLimits, budgets: KeyBudgets
    ) -> KeyRecord:
        """Write a new key. Raises KeyTaken."""
        identity = key_id(digest)
        created_ms = await self._store.eval_script(
            "key_create",
            [_record_key(self._store, digest), self._store.key("keys")],
            [identity, digest, KEYS_MAX, *_fields(name, scope, limits, budgets)],
        )
        if created_ms <= 0:
            raise KeyTaken("the id is taken" if created_ms == 0 else f"{KEYS_MAX} keys exist")
        return KeyRecord(identity, digest, name, created_ms, None, scope, limits, budgets)

    async def find(self, digest: str) -> KeyRecord | None:
        """The key with this digest, revoked or not."""
        stored = await self._store.command("HGETALL", _record_key(self._store, digest))
        return _record(digest, stored) if stored else None

    async def list(self) -> list[KeyRecord]:
        """All keys, oldest first."""
        digests = await self._store.command("HVALS", self._store.key("keys"))
        found = [await self.find(digest.decode()) for digest in digests]
        return sorted((r for r in found if r is not None), key=lambda r: (r.created_ms, r.id))

    async def by_id(self, identity: str) -> KeyRecord | None:
        digest = await self._store.command("HGET", self._store.key("keys"), identity)
        return None if digest is None else await self.find(digest.decode())

    async def revoke(self, identity: str) -> int | None:
        """Milliseconds since the epoch at which the key was (first) revoked; None: no such key."""
        record = await self.by_id(identity)
        if record is None:
            return None
        keys = [_record_key(self._store, record.digest)]
        at_ms: int = await self._store.eval_script("key_revoke", keys, [])
        return at_ms or None


def _record_key(store: StateStore, digest: str) -> str:
    return store.key("key", f"{{{digest}}}", "record")


def _fields(name: str, scope: KeyScope, limits: KeyLimits, budgets: KeyBudgets) -> list[Argument]:
    """Only what is set: a missing field means unbounded, to the scripts too."""
    values: dict[str, Argument | None] = {
        "name": name,
        "policies": _joined(scope.policies),
        "experts": _joined(scope.experts),
        **limits.by_name(),
        **{f"budget_{window}": amount for window, amount in budgets.by_name().items()},
    }
    return [part for key, value in values.items() if value is not None for part in (key, value)]


def _joined(names: Collection[str] | None) -> str | None:
    """Names of policies and experts hold no spaces."""
    return None if names is None else " ".join(sorted(names))


def _record(digest: str, stored: Mapping[bytes, bytes]) -> KeyRecord:
    fields = {name.decode(): value.decode() for name, value in stored.items()}

    def number(name: str) -> int | None:
        return int(fields[name]) if name in fields else None

    def names(name: str) -> frozenset[str] | None:
        return frozenset(fields[name].split()) if name in fields else None

    return KeyRecord(
        id=fields["id"],
        digest=digest,
        name=fields["name"],
        created_ms=int(fields["created_ms"]),
        revoked_ms=number("revoked_ms"),
        scope=KeyScope(names("policies"), names("experts")),
        limits=KeyLimits(**{name: number(name) for name in KeyLimits().by_name()}),
        budgets=KeyBudgets(**{name: number(f"budget_{name}") for name in KeyBudgets().by_name()}),
    )


# --- the ledger ----------------------------------------------------------------------------------


class Settlement(StrEnum):
    """What became of an admission."""

    SETTLED = "settled"
    LATE = "late"  # its lease had ended; charged all the same
    UNKNOWN = "unknown"  # settled before, or never made; nothing charged


@dataclass(frozen=True, slots=True)
class Order:
    """What a request asks of its key.

    ``amount_micro_usd`` and ``tokens`` are worst cases. ``policy`` None: no policy was chosen by
    the caller. ``named``: the expert that ``model`` names. ``experts``: those of the plan.
    """

    amount_micro_usd: int
    tokens: int
    lease_ms: int
    policy: str | None = None
    named: str | None = None
    experts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.amount_micro_usd <= BUDGET_MAX_MICRO_USD:
            raise ValueError(f"amount_micro_usd={self.amount_micro_usd}")
        if self.tokens < 0 or self.lease_ms <= 0:
            raise ValueError(f"tokens={self.tokens}, lease_ms={self.lease_ms}")


@dataclass(frozen=True, slots=True)
class Refused:
    """A refusal, and the state of the key's buckets, which the answer's headers tell."""

    error: CoeError
    rates: Mapping[str, RateState]


@dataclass(frozen=True, slots=True)
class KeyUsage:
    """Micro-dollars spent per present window, reserved by ``running`` requests."""

    hour: int
    day: int
    month: int
    total: int
    reserved: int
    running: int


class KeyLedger:
    """Admits and settles requests of keys."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        common = load_script(_PACKAGE, "key_common.lua")
        for name in ("admit", "settle", "usage"):
            store.add_script(f"key_{name}", common + load_script(_PACKAGE, f"key_{name}.lua"))

    async def admit(
        self, digest: str, admission_id: str, order: Order, now_ms: int | None = None
    ) -> Admitted | Refused:
        """Check every limit and set the worst case aside, or change nothing."""
        reply = await self._store.eval_script(
            "key_admit",
            self._keys(digest),
            [
                admission_id,
                order.amount_micro_usd,
                order.tokens,
                order.lease_ms,
                order.policy or "",
                order.named or "",
                _time(now_ms),
                *order.experts,
            ],
        )
        verdict, about, wait_ms, left = reply[0].decode(), reply[1].decode(), reply[2], reply[3]
        rates = _rates(reply[4:])
        if verdict == "admitted":
            return Admitted(rates)
        return Refused(_refusal(verdict, about, wait_ms, left, order), rates)

    async def settle(
        self,
        digest: str,
        admission_id: str,
        spent_micro_usd: int,
        tokens: int,
        now_ms: int | None = None,
    ) -> Settlement:
        """Charge what was really spent and give the rest back. Idempotent.

        It is charged in full even when more than was reserved: it has been spent.
        """
        if not 0 <= spent_micro_usd <= BUDGET_MAX_MICRO_USD or tokens < 0:
            raise ValueError(f"spent_micro_usd={spent_micro_usd}, tokens={tokens}")
        reply = await self._store.eval_script(
            "key_settle",
            self._keys(digest),
            [admission_id, spent_micro_usd, tokens, _time(now_ms)],
        )
        return Settlement(reply.decode())

    async def usage(self, digest: str, now_ms: int | None = None) -> KeyUsage:
        """Spent and reserved at this moment."""
        return KeyUsage(
            *await self._store.eval_script("key_usage", self._keys(digest), [_time(now_ms)])
        )

    def _keys(self, digest: str) -> list[str]:
        return [
            self._store.key("key", f"{{{digest}}}", part)
            for part in ("record", "usage", "holds", "leases", "expired")
        ]


def _time(now_ms: int | None) -> int | str:
    return "" if now_ms is None else now_ms


def _rates(numbers: Sequence[int]) -> dict[str, RateState]:
    triples = zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)
    return {
        bucket: RateState(limit, remaining, reset_ms)
        for bucket, (limit, remaining, reset_ms) in zip(_BUCKETS, triples, strict=True)
        if limit >= 0
    }


def _refusal(verdict: str, about: str, wait_ms: int, left: int, order: Order) -> CoeError:
    wait = None if wait_ms < 0 else float(wait_ms)
    if verdict == "unknown":
        return AuthenticationFailed(UNKNOWN_KEY)
    if verdict == "revoked":
        return AuthenticationFailed(REVOKED_KEY)
    if verdict in ("policy", "expert"):
        return ScopeDenied(verdict, about)
    if verdict == "budget":
        return BudgetExceeded(f"key's {about}", order.amount_micro_usd, left, wait)
    if verdict == "concurrency":
        return RateLimited(about, wait)
    return RateLimited(f"{about} per minute", wait, left)
