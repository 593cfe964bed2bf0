"""``POST /v1/messages`` and ``/v1/messages/count_tokens``: Anthropic's API, the same service."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from experts.errors import CoeError
from experts.types import Endpoint
from gateway.anthropic_answer import MessageStream, message_of
from gateway.anthropic_errors import anthropic_answer
from gateway.anthropic_request import chat_body, wants_thinking
from gateway.client_watch import ClientGone
from gateway.dialect import StreamWriter
from gateway.headers import Header, request_id_of
from gateway.http_errors import ErrorAnswer
from gateway.journal import Journal
from gateway.keys import sent_secret
from gateway.openai_http import read_body
from gateway.service import GatewayService
from gateway.sse import named_event
from gateway.wire import WireRequest, decoded_object, parse_body

__all__ = ["CountTokensEndpoint", "MessagesDialect"]


class MessagesDialect:
    """Keep-alives are Anthropic's ``ping`` events, which its clients read over."""

    name = "messages"
    keep_alive = named_event("ping", {"type": "ping"})

    def parse(self, raw: bytes) -> WireRequest:
        asked = decoded_object(raw)
        return parse_body(chat_body(asked), Endpoint.CHAT, asked=asked)

    def whole(self, body: dict[str, Any], request: WireRequest, journal: Journal) -> dict[str, Any]:
        return message_of(
            body,
            message_id=_message_id(journal),
            prompt_tokens=_prompt_tokens(journal),
            thinking=wants_thinking(request.asked or {}),
        )

    def writer(self, request: WireRequest, journal: Journal) -> StreamWriter:
        return MessageStream(
            message_id=_message_id(journal),
            request_id=journal.request_id,
            prompt_tokens=lambda: _prompt_tokens(journal),
            thinking=wants_thinking(request.asked or {}),
        )

    def refusal(self, error: CoeError, journal: Journal) -> ErrorAnswer:
        return anthropic_answer(error, journal.request_id, spent=journal.paid)

    def headers(self, journal: Journal) -> Sequence[Header]:
        return ((b"request-id", journal.request_id.encode()),)


class CountTokensEndpoint:
    """How many tokens a message's prompt has, by the tokenizers of the experts it could go to."""

    def __init__(self, service: GatewayService) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._service.journal("messages/count_tokens", request_id_of(scope)) as journal:
            try:
                journal.access = await self._service.authenticate(sent_secret(scope["headers"]))
                asked = decoded_object(await read_body(receive))
                body = chat_body(asked, counting=True) | {"stream": False}
                body.pop("stream_options", None)
                request = parse_body(body, Endpoint.CHAT, asked=asked)
                tokens = await self._service.count_tokens(request, journal)
            except ClientGone:
                journal.outcome = "client_closed"
                return
            except CoeError as error:
                journal.outcome, journal.error = "error", error
                answer = anthropic_answer(error, journal.request_id)
            else:
                text = msgspec.json.encode({"input_tokens": tokens})
                headers = [(b"content-type", b"application/json")]
                headers.append((b"content-length", b"%d" % len(text)))
                answer = ErrorAnswer(200, headers, text)
            headers = [*answer.headers, (b"request-id", journal.request_id.encode())]
            start = {"type": "http.response.start", "status": answer.status, "headers": headers}
            await send(start)
            await send({"type": "http.response.body", "body": answer.body})


def _message_id(journal: Journal) -> str:
    return f"msg_{journal.decision_id.removeprefix('dec-')}"


def _prompt_tokens(journal: Journal) -> int:
    return journal.decision.prompt_tokens if journal.decision is not None else 0
