"""The one table from error classes to HTTP answers, in OpenAI's shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from experts import errors as e

__all__ = ["CLIENT_CLOSED_STATUS", "ErrorAnswer", "HttpError", "answer_for", "error_object"]

CLIENT_CLOSED_STATUS = 499  # in logs and metrics only: nobody is left to read it

_INVALID = "invalid_request_error"
_OVERLOADED = "overloaded_error"
_SERVER = "server_error"
_UPSTREAM = "upstream_error"


@dataclass(frozen=True, slots=True)
class HttpError:
    """``should_retry``: what to tell the client; None leaves it to the client's own rules."""

    status: int
    type: str
    code: str
    should_retry: bool | None = None


TABLE: dict[type[e.CoeError], HttpError] = {
    e.CoeError: HttpError(500, _SERVER, "internal_error"),
    e.RequestError: HttpError(400, _INVALID, "invalid_request"),
    e.InvalidRequest: HttpError(400, _INVALID, "invalid_request"),
    e.UnknownModel: HttpError(404, _INVALID, "model_not_found"),
    e.UnknownRoute: HttpError(404, _INVALID, "path_not_found"),
    e.MethodNotAllowed: HttpError(405, _INVALID, "method_not_allowed"),
    e.BodyTooLarge: HttpError(413, _INVALID, "body_too_large"),
    e.RevisionChanged: HttpError(412, _INVALID, "revision_changed"),
    e.PromptTooLong: HttpError(400, _INVALID, "context_length_exceeded"),
    e.NoEligibleExpert: HttpError(400, _INVALID, "no_eligible_expert"),
    e.AuthenticationFailed: HttpError(401, "authentication_error", "invalid_api_key"),
    e.ScopeDenied: HttpError(403, "permission_error", "scope_denied"),
    e.BudgetExceeded: HttpError(402, "insufficient_quota", "insufficient_quota", False),
    e.RateLimited: HttpError(429, "rate_limit_error", "rate_limit_exceeded"),
    e.CapacityError: HttpError(503, _OVERLOADED, "overloaded"),
    e.QueueFull: HttpError(503, _OVERLOADED, "queue_full"),
    e.DeadlineUnreachable: HttpError(503, _OVERLOADED, "deadline_unreachable"),
    e.HostUnavailable: HttpError(503, _OVERLOADED, "host_unavailable"),
    e.ConnectionPoolFull: HttpError(503, _OVERLOADED, "connection_pool_full"),
    e.PlacementRefused: HttpError(409, _OVERLOADED, "placement_refused"),
    e.StateUnavailable: HttpError(503, _OVERLOADED, "state_unavailable"),
    e.ExpertError: HttpError(502, _UPSTREAM, "expert_error"),
    e.ExpertFailed: HttpError(502, _UPSTREAM, "expert_failed"),
    e.ExpertOutOfService: HttpError(503, _UPSTREAM, "expert_out_of_service"),
    e.HostLost: HttpError(502, _UPSTREAM, "host_lost"),
    # The expert was at work when its time ran out; asking again pays for the same work again.
    e.UpstreamTimeout: HttpError(504, _UPSTREAM, "upstream_timeout", False),
    e.SwapFailed: HttpError(503, _UPSTREAM, "swap_failed"),
    e.CanaryMismatch: HttpError(503, _UPSTREAM, "canary_mismatch"),
    e.ConfigError: HttpError(500, _SERVER, "config_error", False),
    e.ArtifactError: HttpError(500, _SERVER, "artifact_error", False),
}

_PASSED_ON = frozenset({400, 413, 422})  # an expert that blames the request is believed
_OUR_FILES = (e.ConfigError, e.ArtifactError)


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """A whole HTTP answer, ready to send."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


def row_for(error: e.CoeError) -> HttpError:
    """The table's row, with an expert's own verdict on the request passed on."""
    row = TABLE[type(error)]
    if isinstance(error, e.ExpertFailed) and error.status in _PASSED_ON:
        return HttpError(error.status, _INVALID, error.error_code or row.code)
    if isinstance(error, e.ExpertFailed) and error.status == 429:
        return HttpError(503, _OVERLOADED, "expert_busy")
    return row


def error_object(error: e.CoeError) -> dict[str, Any]:
    """``{"error": {...}}``, for a body or for an event in a stream."""
    row = row_for(error)
    # Paths of our own files are the operator's business; they are in the log.
    message = "The gateway is misconfigured." if isinstance(error, _OUR_FILES) else error.message
    fields = {"message": message, "type": row.type, "param": error.param, "code": row.code}
    return {"error": fields}


def _never_fits(error: e.CoeError) -> bool:
    return isinstance(error, e.RateLimited) and error.retry_after_ms is None


def answer_for(error: e.CoeError, *, spent: bool = False) -> ErrorAnswer:
    """``spent``: experts were paid for this request already, so no client may retry by itself."""
    row = row_for(error)
    body = msgspec.json.encode(error_object(error))
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
    ]
    if error.retry_after_s is not None and not spent:
        headers.append((b"retry-after", b"%d" % error.retry_after_s))
    if isinstance(error, e.MethodNotAllowed):
        headers.append((b"allow", ", ".join(error.allowed).encode("latin-1")))
    if spent or row.should_retry is False or _never_fits(error):
        headers.append((b"x-should-retry", b"false"))
    return ErrorAnswer(row.status, headers, body)
