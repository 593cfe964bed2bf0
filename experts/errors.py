"""Every error that crosses a module, process or network boundary here.

CoeError
├── RequestError            the caller's fault; nothing was charged
│   ├── InvalidRequest      a field is missing, of the wrong type or out of range
│   ├── UnknownModel        neither a policy nor an expert
│   ├── UnknownRoute        no such path
│   ├── MethodNotAllowed    the path exists, the method does not
│   ├── BodyTooLarge        the body exceeds the configured bound
│   ├── RevisionChanged     what is to be changed is not any more what the caller has seen
│   ├── PromptTooLong       no context window holds the prompt
│   └── NoEligibleExpert    every expert lacks something the request needs
├── AuthenticationFailed    no key, or one that is not valid
├── ScopeDenied             the key does not permit this policy or expert
├── BudgetExceeded          the request, key or policy has no money left
├── RateLimited             too many requests or tokens
├── CapacityError           we could serve this, but not now
│   ├── QueueFull           a bounded queue is at its bound
│   ├── DeadlineUnreachable the measured wait exceeds the request's deadline
│   ├── HostUnavailable     no live host serves the expert
│   ├── PlacementRefused    a host will not take in, or let go of, an expert's weights now
│   └── StateUnavailable    the state store is away and the policy says fail closed
├── ExpertError             an expert or its host failed
│   ├── ExpertFailed        the expert answered with an error of its own
│   ├── ExpertOutOfService  taken out of service (failed swap, canary mismatch)
│   ├── HostLost            the connection to a host broke
│   ├── UpstreamTimeout     a phase of the call took too long
│   ├── SwapFailed          weights could not be made resident
│   └── CanaryMismatch      weights are resident but answer differently from when they were pooled
├── ConfigError             a configuration or policy file is wrong
└── ArtifactError           a router artifact or model folder does not fit

Errors are dataclasses of plain fields, so that they survive pickling between Ray processes with
class and fields intact (an exception whose ``__init__`` differs from ``args`` does not). The prose
is made from the fields by ``message``; nothing parses it. ``gateway.http_errors`` maps every class
to a status, type and code.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


def _rebuild(cls: type[CoeError], values: dict[str, Any]) -> CoeError:
    return cls(**values)


@dataclass(eq=False)
class CoeError(Exception):
    """Root of all errors of this project."""

    @property
    def message(self) -> str:
        """One sentence for a person: what is wrong and what to do."""
        return "This server failed on the request; its log has the cause under the request's id."

    @property
    def param(self) -> str | None:
        """The request field at fault, if one is."""
        return None

    @property
    def retry_after_s(self) -> int | None:
        """Whole seconds after which a retry makes sense; None when it does not."""
        return None

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), {f.name: getattr(self, f.name) for f in fields(self)}))


def _listed(names: tuple[str, ...], limit: int = 12) -> str:
    shown = ", ".join(names[:limit])
    return f"{shown}, … ({len(names)} in all)" if len(names) > limit else shown


def _ceil_s(wait_ms: float) -> int:
    """Milliseconds to whole seconds, at least 1, at most 120 (clients ignore longer waits)."""
    return int(min(120, max(1, -(-wait_ms // 1000))))


# --- the caller's fault --------------------------------------------------------------------------


@dataclass(eq=False)
class RequestError(CoeError):
    """The request cannot be served as it stands."""


@dataclass(eq=False)
class InvalidRequest(RequestError):
    field_name: str | None
    reason: str

    @property
    def message(self) -> str:
        return f"{self.field_name}: {self.reason}" if self.field_name else self.reason

    @property
    def param(self) -> str | None:
        return self.field_name


@dataclass(eq=False)
class UnknownModel(RequestError):
    model: str
    available: tuple[str, ...]

    @property
    def message(self) -> str:
        return f"model: no policy or expert {self.model!r}. Available: {_listed(self.available)}."

    @property
    def param(self) -> str | None:
        return "model"


@dataclass(eq=False)
class UnknownRoute(RequestError):
    path: str

    @property
    def message(self) -> str:
        return f"There is no path {self.path!r} here. GET /v1/models lists what can be asked."


@dataclass(eq=False)
class MethodNotAllowed(RequestError):
    method: str
    path: str
    allowed: tuple[str, ...]

    @property
    def message(self) -> str:
        return f"{self.path!r} takes {_listed(self.allowed)}, not {self.method}."


@dataclass(eq=False)
class BodyTooLarge(RequestError):
    limit_bytes: int

    @property
    def message(self) -> str:
        return f"The request body is larger than the limit of {self.limit_bytes} bytes."


@dataclass(eq=False)
class RevisionChanged(RequestError):
    what: str

    @property
    def message(self) -> str:
        return f"{self.what} has been changed since it was read; read it again."


@dataclass(eq=False)
class PromptTooLong(RequestError):
    tokens: int
    limit_tokens: int
    field_name: str = "messages"

    @property
    def message(self) -> str:
        return (
            f"{self.field_name}: the prompt and the requested output need about {self.tokens} "
            f"tokens; the longest context of any permitted expert is {self.limit_tokens}."
        )

    @property
    def param(self) -> str | None:
        return self.field_name


@dataclass(eq=False)
class NoEligibleExpert(RequestError):
    """``exclusions`` says for each expert why it was left out."""

    exclusions: dict[str, str]

    @property
    def message(self) -> str:
        why = "; ".join(f"{name}: {reason}" for name, reason in sorted(self.exclusions.items()))
        return f"No expert can serve this request ({why or 'the catalogue is empty'})."


# --- keys, money, rates --------------------------------------------------------------------------


@dataclass(eq=False)
class AuthenticationFailed(CoeError):
    reason: str

    @property
    def message(self) -> str:
        return f"{self.reason} Send 'Authorization: Bearer <key>'."


@dataclass(eq=False)
class ScopeDenied(CoeError):
    """``kind`` is policy or expert; ``name`` the one asked for."""

    kind: str
    name: str

    @property
    def message(self) -> str:
        return f"model: this API key does not permit the {self.kind} {self.name!r}."

    @property
    def param(self) -> str | None:
        return "model"


@dataclass(eq=False)
class BudgetExceeded(CoeError):
    """``opens_in_ms``: until the budget's window begins anew; None when it never will."""

    scope: str
    needed_micro_usd: int
    left_micro_usd: int
    opens_in_ms: float | None = None

    @property
    def message(self) -> str:
        opens = ""
        if self.opens_in_ms is not None:
            opens = f" It begins anew in {-(-self.opens_in_ms // 1000):.0f} s."
        return (
            f"The {self.scope} budget allows {self.left_micro_usd / 1e6:.6f} USD more; "
            f"this request may cost up to {self.needed_micro_usd / 1e6:.6f} USD. "
            f"Lower max_tokens or raise the budget.{opens}"
        )

    @property
    def retry_after_s(self) -> int | None:
        """Not capped: no client retries a 402 by itself; this is for whoever reads it."""
        return None if self.opens_in_ms is None else max(1, int(-(-self.opens_in_ms // 1000)))


@dataclass(eq=False)
class RateLimited(CoeError):
    """``retry_after_ms`` None: the request alone is larger than the limit. ``left``: units left."""

    scope: str
    retry_after_ms: float | None
    left: int | None = None

    @property
    def message(self) -> str:
        if self.retry_after_ms is None:
            return f"This request alone exceeds the limit of {self.scope}. Lower max_tokens."
        left = "" if self.left is None else f", {self.left} are left"
        return f"The limit of {self.scope} is reached{left}; retry in {self.retry_after_s} s."

    @property
    def retry_after_s(self) -> int | None:
        return None if self.retry_after_ms is None else _ceil_s(self.retry_after_ms)


# --- not now -------------------------------------------------------------------------------------


@dataclass(eq=False)
class CapacityError(CoeError):
    """Could be served, but not at this moment."""


@dataclass(eq=False)
class QueueFull(CapacityError):
    expert: str
    depth: int
    retry_after_ms: float

    @property
    def message(self) -> str:
        return f"The queue before {self.expert!r} holds {self.depth} requests, its bound."

    @property
    def retry_after_s(self) -> int | None:
        return _ceil_s(self.retry_after_ms)


@dataclass(eq=False)
class DeadlineUnreachable(CapacityError):
    """``retry_after_ms``: after how long the wait would fit, if that is known."""

    expert: str
    wait_ms: float
    deadline_ms: float
    retry_after_ms: float | None = None

    @property
    def message(self) -> str:
        return (
            f"{self.expert!r} would start in about {self.wait_ms:.0f} ms; "
            f"the request allows {self.deadline_ms:.0f} ms."
        )

    @property
    def retry_after_s(self) -> int | None:
        return _ceil_s(self.wait_ms if self.retry_after_ms is None else self.retry_after_ms)


@dataclass(eq=False)
class HostUnavailable(CapacityError):
    """``reason`` says why an expert that has a host, or needs none, is not asked."""

    expert: str
    retry_after_ms: float = 5_000.0
    reason: str = ""

    @property
    def message(self) -> str:
        if self.reason:
            return f"Expert {self.expert!r} is not asked now: {self.reason}."
        return f"No live host serves {self.expert!r} at the moment."

    @property
    def retry_after_s(self) -> int | None:
        return _ceil_s(self.retry_after_ms)


@dataclass(eq=False)
class ConnectionPoolFull(CapacityError):
    """The gateway's own bound, and nothing against the expert, which has not been asked."""

    expert: str
    limit: int
    waited_ms: float
    retry_after_ms: float = 1_000.0

    @property
    def message(self) -> str:
        return (
            f"All {self.limit} connections to expert {self.expert!r} stayed in use for "
            f"{self.waited_ms:.0f} ms."
        )

    @property
    def retry_after_s(self) -> int | None:
        return _ceil_s(self.retry_after_ms)


@dataclass(eq=False)
class PlacementRefused(CapacityError):
    """Nothing was changed. ``reason`` says what stands against it now."""

    expert: str
    reason: str

    @property
    def message(self) -> str:
        return f"The placement of expert {self.expert!r} is not changed now: {self.reason}."


@dataclass(eq=False)
class StateUnavailable(CapacityError):
    operation: str
    retry_after_ms: float = 2_000.0

    @property
    def message(self) -> str:
        return f"The state store does not answer ({self.operation})."

    @property
    def retry_after_s(self) -> int | None:
        return _ceil_s(self.retry_after_ms)


# --- experts and hosts ---------------------------------------------------------------------------


@dataclass(eq=False)
class ExpertError(CoeError):
    """An expert, or the host that holds it, failed."""

    expert: str


@dataclass(eq=False)
class ExpertFailed(ExpertError):
    """The expert answered with an error; ``status`` is its own HTTP status."""

    status: int
    detail: str
    error_param: str | None = None
    error_code: str | None = None
    retry_after_ms: float | None = None  # what it asked to wait, if it is merely busy

    @property
    def message(self) -> str:
        return f"Expert {self.expert!r} answered {self.status}: {self.detail}"

    @property
    def retry_after_s(self) -> int | None:
        return None if self.retry_after_ms is None else _ceil_s(self.retry_after_ms)

    @property
    def param(self) -> str | None:
        return self.error_param


@dataclass(eq=False)
class ExpertOutOfService(ExpertError):
    reason: str

    @property
    def message(self) -> str:
        return f"Expert {self.expert!r} is out of service: {self.reason}"


@dataclass(eq=False)
class HostLost(ExpertError):
    """``sent_tokens`` counts what had reached the caller: 0 means a retry elsewhere is safe."""

    host: str
    sent_tokens: int = 0

    @property
    def message(self) -> str:
        return f"The host of expert {self.expert!r} stopped answering."


@dataclass(eq=False)
class UpstreamTimeout(ExpertError):
    phase: str
    limit_ms: float

    @property
    def message(self) -> str:
        return f"Expert {self.expert!r} exceeded {self.limit_ms:.0f} ms ({self.phase})."


@dataclass(eq=False)
class SwapFailed(ExpertError):
    reason: str

    @property
    def message(self) -> str:
        return f"The weights of expert {self.expert!r} could not be made resident: {self.reason}"


@dataclass(eq=False)
class CanaryMismatch(ExpertError):
    expected_token: int
    got_token: int
    expected_logprob: float
    got_logprob: float

    @property
    def message(self) -> str:
        return (
            f"Expert {self.expert!r} failed its canary after a swap: expected token "
            f"{self.expected_token} at {self.expected_logprob:.6f}, got {self.got_token} at "
            f"{self.got_logprob:.6f}."
        )


# --- files ---------------------------------------------------------------------------------------


@dataclass(eq=False)
class ConfigError(CoeError):
    """A configuration or policy file is wrong; nothing was changed."""

    file: str
    line: int | None
    key: str
    reason: str
    nearest: str | None = None

    @property
    def message(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        hint = f" Did you mean {self.nearest!r}?" if self.nearest else ""
        return (
            f"{where}: {self.key}: {self.reason}{hint}"
            if self.key
            else (f"{where}: {self.reason}{hint}")
        )


@dataclass(eq=False)
class ArtifactError(CoeError):
    """``differences`` names what was expected and what was found, key by key."""

    path: str
    reason: str
    differences: dict[str, str] = field(default_factory=dict)

    @property
    def message(self) -> str:
        diff = "; ".join(f"{k}: {v}" for k, v in sorted(self.differences.items()))
        return f"{self.path}: {self.reason}" + (f" ({diff})" if diff else "")
