"""``POST /v1/feedback``, as a plain ASGI endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
from starlette.types import Receive, Scope, Send

from experts.errors import CoeError, InvalidRequest
from gateway.client_watch import ClientGone
from gateway.feedback import Feedback, parse_feedback
from gateway.http_errors import answer_for
from gateway.keys import Access, sent_secret
from gateway.openai_http import read_body
from gateway.state.feedback import FeedbackStore, Given

__all__ = ["FeedbackEndpoint"]

_UNKNOWN = (
    "no decision of this API key has this id; it was never made, or is older than the decision log"
)

_LOG_BEHIND_S = (0.02, 0.2)


class FeedbackEndpoint:
    """Counts what a caller says of an answer. ``authenticate`` as the service does."""

    def __init__(
        self,
        authenticate: Callable[[str | None], Awaitable[Access]],
        store: FeedbackStore,
    ) -> None:
        self._authenticate = authenticate
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            access = await self._authenticate(sent_secret(scope["headers"]))
            feedback = parse_feedback(await read_body(receive))
            given = await self._give(feedback, access.key.id if access.key else None)
            if given is Given.UNKNOWN:
                raise InvalidRequest("decision_id", _UNKNOWN)
            if given is Given.UNANSWERED:
                raise InvalidRequest("decision_id", "no expert answered that request")
        except ClientGone:
            return
        except CoeError as error:
            answer = answer_for(error)
            await _send(send, answer.status, answer.headers, answer.body)
            return
        body = msgspec.json.encode(
            {
                "object": "feedback",
                "decision_id": feedback.decision_id,
                "score": feedback.score,
                "result": given.value,
            }
        )
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
        ]
        await _send(send, 200, headers, body)

    async def _give(self, feedback: Feedback, key_id: str | None) -> Given:
        """Decisions are written behind the answers: who judges at once may be ahead of the log."""
        given = await self._store.give(feedback, key_id)
        for wait_s in _LOG_BEHIND_S:
            if given is not Given.UNKNOWN:
                break
            await asyncio.sleep(wait_s)
            given = await self._store.give(feedback, key_id)
        return given


async def _send(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
