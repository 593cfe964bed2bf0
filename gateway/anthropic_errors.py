"""Errors in Anthropic's shape, for the paths that speak it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec

from experts.errors import CoeError
from gateway.http_errors import ErrorAnswer, answer_for, error_object, row_for

__all__ = ["MESSAGES_PATH", "answer_on", "anthropic_answer", "anthropic_error"]

MESSAGES_PATH = "/v1/messages"
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_error(error: CoeError, request_id: str) -> dict[str, Any]:
    """``{"type": "error", "error": {"type", "message"}}``; our code and param stand beside them."""
    row = row_for(error)
    kind = _TYPES.get(row.status, "invalid_request_error" if row.status < 500 else "api_error")
    fields = error_object(error)["error"]
    detail = {"type": kind, "message": fields["message"]}
    detail |= {"code": fields["code"], "param": fields["param"]}
    return {"type": "error", "error": detail, "request_id": request_id}


def anthropic_answer(error: CoeError, request_id: str, *, spent: bool = False) -> ErrorAnswer:
    """As ``answer_for``: the same status and headers, another body."""
    answer = answer_for(error, spent=spent)
    body = msgspec.json.encode(anthropic_error(error, request_id))
    headers = [(name, value) for name, value in answer.headers if name != b"content-length"]
    return replace(answer, headers=[*headers, (b"content-length", b"%d" % len(body))], body=body)


def answer_on(path: str, error: CoeError, request_id: str) -> ErrorAnswer:
    """An error met before any endpoint took the request, in the shape of its path."""
    if path == MESSAGES_PATH or path.startswith(MESSAGES_PATH + "/"):
        return anthropic_answer(error, request_id)
    return answer_for(error)
