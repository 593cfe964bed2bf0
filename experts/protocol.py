"""The seam between "what to ask" and "who answers": one small protocol, several backends.

A backend takes an OpenAI request body as a plain mapping and returns OpenAI response bodies, so
that fields nobody here knows pass through unharmed. Backends raise ``experts.errors``; they never
return an error as data. Closing a stream early cancels the generation where it runs.

Implementations: ``experts.http_backend.HttpBackend`` (expert hosts and remote servers) and
``experts.scripted.ScriptedBackend``.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import msgspec

from experts.types import Endpoint


class ExpertCall(msgspec.Struct, frozen=True):
    """One call of one expert. ``body`` is the OpenAI request; the backend sets model and stream.

    ``timeout_ms`` bounds the whole call, ``first_token_timeout_ms`` the wait for the first event,
    ``idle_timeout_ms`` the silence between two events. ``queue_deadline_ms``: how long the request
    may wait for its expert to become resident before the host must refuse it (None: host's bound).
    ``traceparent``: the caller's span, as W3C Trace Context writes it, for the expert's own spans.
    ``likely_next``: the expert to be asked if this one's answer is not good enough, for its host to
    look ahead.
    """

    expert: str
    endpoint: Endpoint
    body: Mapping[str, Any]
    request_id: str
    timeout_ms: float
    first_token_timeout_ms: float
    idle_timeout_ms: float
    queue_deadline_ms: float | None = None
    priority: int = 0
    traceparent: str | None = None
    likely_next: str | None = None


class CallTimings(msgspec.Struct, frozen=True):
    """What the host reports in its response headers; zero where the backend has no such phase."""

    host: str = ""
    queue_ms: float = 0.0
    swap_ms: float = 0.0


class ExpertReply(msgspec.Struct, frozen=True):
    """A whole answer: the decoded OpenAI response body."""

    body: dict[str, Any]
    timings: CallTimings = CallTimings()


class ExpertStream(Protocol):
    """An open answer: iterate for the raw JSON payload of each ``data:`` event, ``[DONE]``
    excluded.

    ``timings`` is complete before the first event is yielded.
    """

    @property
    def timings(self) -> CallTimings: ...

    def __aiter__(self) -> AsyncIterator[bytes]: ...


class Backend(Protocol):
    """Somebody who can run an expert."""

    async def complete(self, call: ExpertCall) -> ExpertReply:
        """Run to the end. Cancelling the awaiting task cancels the generation."""
        ...

    def stream(self, call: ExpertCall) -> AbstractAsyncContextManager[ExpertStream]:
        """Open a stream. Leaving the context early aborts the generation at the expert."""
        ...

    async def aclose(self) -> None: ...
