"""``POST /v1/responses``: OpenAI's Responses API over the same service, nothing stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experts.errors import CoeError
from experts.types import Endpoint
from gateway.dialect import StreamWriter
from gateway.http_errors import ErrorAnswer, answer_for
from gateway.journal import Journal
from gateway.responses_answer import ResponsesStream, response_of
from gateway.responses_request import chat_body
from gateway.sse import KEEP_ALIVE
from gateway.wire import WireRequest, decoded_object, parse_body

__all__ = ["ResponsesDialect"]


class ResponsesDialect:
    """Errors and keep-alive comments are those of OpenAI's other endpoints."""

    name = "responses"
    keep_alive = KEEP_ALIVE

    def parse(self, raw: bytes) -> WireRequest:
        asked = decoded_object(raw)
        body = chat_body(asked)
        return parse_body(body, Endpoint.CHAT, asked=asked, prompt_field="input")

    def whole(self, body: dict[str, Any], request: WireRequest, journal: Journal) -> dict[str, Any]:
        created_s = journal.wall_ms // 1000
        return response_of(body, request.asked or {}, tag=_tag(journal), created_s=created_s)

    def writer(self, request: WireRequest, journal: Journal) -> StreamWriter:
        created_s = journal.wall_ms // 1000
        return ResponsesStream(request.asked or {}, tag=_tag(journal), created_s=created_s)

    def refusal(self, error: CoeError, journal: Journal) -> ErrorAnswer:
        return answer_for(error, spent=journal.paid)

    def headers(self, journal: Journal) -> Sequence[tuple[bytes, bytes]]:
        return ()


def _tag(journal: Journal) -> str:
    return journal.decision_id.removeprefix("dec-")
