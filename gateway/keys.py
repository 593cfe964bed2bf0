"""API keys: what one is, what it permits, how it is written. Pure.

A key's secret is 256 random bits behind a fixed prefix, shown once. Only its SHA-256 is kept: a
secret of full entropy needs no salt and no slow hash.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

__all__ = [
    "BUDGET_MAX_MICRO_USD",
    "RATE_MAX",
    "Access",
    "Admitted",
    "KeyBudgets",
    "KeyLimits",
    "KeyRecord",
    "KeyScope",
    "RateState",
    "digest_of",
    "key_id",
    "key_secret",
    "looks_like_a_key",
    "sent_secret",
    "written_duration",
]

SECRET_PREFIX = "coe-sk-"
SECRET_BYTES = 32
ID_PREFIX = "key-"
RATE_MAX = 1_000_000_000  # per minute; the bucket counts in sixty-thousandths, exact to 2**53
BUDGET_MAX_MICRO_USD = 2**53 - 1  # Lua's numbers are exact up to here: nine billion dollars
NAME_CHARS_MAX = 100

_SECRET = re.compile(rf"{SECRET_PREFIX}[A-Za-z0-9_-]{{43}}")
_ID_HEX_DIGITS = 16


# --- secrets -------------------------------------------------------------------------------------


def key_secret(random_bytes: bytes) -> str:
    """The secret made of 32 random bytes. Raises ValueError for another number of them."""
    if len(random_bytes) != SECRET_BYTES:
        raise ValueError(f"a secret is made of {SECRET_BYTES} random bytes")
    return SECRET_PREFIX + base64.urlsafe_b64encode(random_bytes).rstrip(b"=").decode()


def digest_of(secret: str) -> str:
    """SHA-256 of the secret, in hex: the name under which the store knows the key."""
    return hashlib.sha256(secret.encode()).hexdigest()


def key_id(digest: str) -> str:
    """What people call a key: the start of its digest, which says nothing about the secret."""
    return ID_PREFIX + digest[:_ID_HEX_DIGITS]


def looks_like_a_key(secret: str) -> bool:
    """Whether it could be one of ours. What cannot be need not be looked up."""
    return _SECRET.fullmatch(secret) is not None


def sent_secret(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The secret a request carries: ``authorization: Bearer`` or ``x-api-key``; None: neither."""
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip().decode("latin-1") or None
        if name == b"x-api-key":
            return value.strip().decode("latin-1") or None
    return None


# --- what a key permits --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KeyScope:
    """What a key may ask for; None: anything.

    ``policies``: names, without ``coe/``. ``experts``: who may answer; whoever is missing is left
    out before any ranking.
    """

    policies: frozenset[str] | None = None
    experts: frozenset[str] | None = None

    def allows_policy(self, name: str) -> bool:
        return self.policies is None or name in self.policies

    def allows_expert(self, expert: str) -> bool:
        """Whether this expert may serve a policy's request."""
        return self.experts is None or expert in self.experts

    def allows_naming(self, expert: str) -> bool:
        """Whether ``model`` may be this expert: past the policies only for keys that list it."""
        return self.policies is None if self.experts is None else expert in self.experts


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Bounds of use; None: unbounded. Raises ValueError for a bound below 1 or above RATE_MAX."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.by_name().items():
            if value is not None and not 1 <= value <= RATE_MAX:
                raise ValueError(f"{name}={value} is not within 1..{RATE_MAX}")

    def by_name(self) -> dict[str, int | None]:
        return {
            "requests_per_minute": self.requests_per_minute,
            "tokens_per_minute": self.tokens_per_minute,
            "concurrent_requests": self.concurrent_requests,
        }


@dataclass(frozen=True, slots=True)
class KeyBudgets:
    """Micro-dollars per hour, day and calendar month (all UTC) and altogether; None: unbounded.

    Raises ValueError for an amount outside 0..BUDGET_MAX_MICRO_USD.
    """

    hour: int | None = None
    day: int | None = None
    month: int | None = None
    total: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.by_name().items():
            if value is not None and not 0 <= value <= BUDGET_MAX_MICRO_USD:
                raise ValueError(f"{name}={value} is not within 0..{BUDGET_MAX_MICRO_USD}")

    def by_name(self) -> dict[str, int | None]:
        return {"hour": self.hour, "day": self.day, "month": self.month, "total": self.total}


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """A key as the store keeps it. ``created_ms`` and ``revoked_ms`` are since the epoch."""

    id: str
    digest: str = field(repr=False)
    name: str
    created_ms: int
    revoked_ms: int | None = None
    scope: KeyScope = field(default_factory=KeyScope)
    limits: KeyLimits = field(default_factory=KeyLimits)
    budgets: KeyBudgets = field(default_factory=KeyBudgets)


# --- a request's way past the gate ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Access:
    """Who asks. ``key`` None: nobody in particular.

    ``unverified``: something that looks like a key was sent, and the store could not be asked.
    """

    key: KeyRecord | None = None
    unverified: bool = False

    @property
    def scope(self) -> KeyScope:
        return self.key.scope if self.key is not None else KeyScope()


@dataclass(frozen=True, slots=True)
class RateState:
    """A bucket after a request: ``reset_ms`` until it is full again."""

    limit: int
    remaining: int
    reset_ms: int


@dataclass(frozen=True, slots=True)
class Admitted:
    """What the gate said of a request, admitted or refused: its buckets by name."""

    rates: Mapping[str, RateState] = field(default_factory=dict)


def written_duration(ms: int) -> str:
    """Milliseconds as OpenAI writes them in ``x-ratelimit-reset-*``: 20ms, 1.5s, 6m0s, 1h0m0s."""
    if ms < 1_000:
        return f"{ms}ms"
    seconds, rest_ms = divmod(ms, 1_000)
    if seconds < 60:
        return f"{seconds}.{rest_ms:03d}".rstrip("0").rstrip(".") + "s"
    minutes, seconds = divmod(-(-ms // 1_000), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{seconds}s" if hours else f"{minutes}m{seconds}s"
