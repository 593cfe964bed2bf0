"""Response headers of ours, and the request id that every response carries."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from experts.types import MICRO_USD_PER_USD
from gateway.journal import Journal
from gateway.keys import written_duration

__all__ = ["RequestIds", "coe_headers", "request_id_of"]

Header = tuple[bytes, bytes]
_SANE_ID = re.compile(rb"[A-Za-z0-9._:+/=-]{1,128}")
_REQUEST_ID = b"x-request-id"


def coe_headers(journal: Journal, *, whole: bool) -> list[Header]:
    """What is known when the headers go out; ``whole``: the answer is complete, cost included."""
    headers: list[Header] = [(b"x-coe-decision-id", journal.decision_id.encode())]
    for bucket, rate in journal.rates.items():
        headers += [
            (b"x-ratelimit-limit-" + bucket.encode(), b"%d" % rate.limit),
            (b"x-ratelimit-remaining-" + bucket.encode(), b"%d" % rate.remaining),
            (b"x-ratelimit-reset-" + bucket.encode(), written_duration(rate.reset_ms).encode()),
        ]
    if journal.decision is None:
        return headers
    plan = journal.decision.plan
    headers += [
        # A policy or category name is checked by its loader, but Latin-1 is what a header holds.
        (b"x-coe-category", plan.category.encode("latin-1", "replace")),
        (b"x-coe-policy", plan.policy.encode("latin-1", "replace")),
        (b"x-coe-stages", b"%d" % len(journal.stages)),
        (b"x-coe-router-ms", b"%.3f" % journal.router_ms),
        (b"x-coe-queue-ms", b"%.1f" % journal.queue_ms),
        (b"x-coe-swap-ms", b"%.1f" % journal.swap_ms),
    ]
    if journal.served is not None:
        headers.append((b"x-coe-expert", journal.served.expert.encode()))
    if whole:
        headers.append((b"x-coe-cost-usd", b"%.6f" % (journal.spent_micro_usd / MICRO_USD_PER_USD)))
    return headers


def request_id_of(scope: Scope) -> str:
    """The id that ``RequestIds`` gave the request."""
    state: dict[str, Any] = scope.get("state") or {}
    return str(state.get("request_id", ""))


class RequestIds:
    """Pure ASGI middleware: takes the client's ``x-request-id`` if it is sane, else makes one.

    The id is in ``scope["state"]`` and on every response.
    """

    def __init__(self, app: ASGIApp, *, new_id: Callable[[], str]) -> None:
        self._app = app
        self._new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _sent_id(scope) or self._new_id().encode()
        scope.setdefault("state", {})["request_id"] = request_id.decode()

        def send_with_id(message: Message) -> Any:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (_REQUEST_ID, request_id)]
            return send(message)

        await self._app(scope, receive, send_with_id)


def _sent_id(scope: Scope) -> bytes | None:
    for name, value in scope["headers"]:
        if name == _REQUEST_ID:
            return value if _SANE_ID.fullmatch(value) else None
    return None
