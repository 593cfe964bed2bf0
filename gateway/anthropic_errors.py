"""Errors in Anthropic's shape, for the requests that speak it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import msgspec
from starlette.types import Scope

from experts.errors import CoeError
from gateway.headers import request_id_of
from gateway.http_errors import ErrorAnswer, answer_for, error_object, row_for

__all__ = ["answer_on", "anthropic_answer", "anthropic_error", "names_version"]

MESSAGES_PATH = "/v1/messages"
MODELS_PATH = "/v1/models"  # of both APIs
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


def answer_on(scope: Scope, error: CoeError) -> ErrorAnswer:
    """An error met outside the answering endpoints, in the shape of the API that was spoken."""
    if not _speaks_anthropic(scope):
        return answer_for(error)
    request_id = request_id_of(scope)
    answer = anthropic_answer(error, request_id)
    return replace(answer, headers=[*answer.headers, (b"request-id", request_id.encode())])


def names_version(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether a request carries ``anthropic-version``, as all of Anthropic's clients send it."""
    return any(name == b"anthropic-version" for name, _ in headers)


def _speaks_anthropic(scope: Scope) -> bool:
    path = scope["path"]
    if _is_below(path, MESSAGES_PATH):
        return True
    return _is_below(path, MODELS_PATH) and names_version(scope["headers"])


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root + "/")
