"""Error answers of an upstream server, turned back into the typed error they stand for. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from experts.errors import (
    CoeError,
    DeadlineUnreachable,
    ExpertFailed,
    ExpertOutOfService,
    HostLost,
    HostUnavailable,
    QueueFull,
    SwapFailed,
)

__all__ = ["error_from_event", "error_from_reply"]

DETAIL_CHARS_MAX = 500
_RETRY_AFTER_DEFAULT_S = 1.0


def error_from_reply(
    *, expert: str, status: int, headers: Mapping[str, str], body: bytes, waited_ms: float
) -> CoeError:
    """The error behind a non-2xx reply.

    Codes of our own hosts come back as the class that was raised there; anything else is
    ExpertFailed with the fields of the OpenAI error body. ``waited_ms`` is how long the request was
    allowed to queue, for DeadlineUnreachable.
    """
    fields = _error_fields(_decoded(body))
    code, detail = _text(fields.get("code")), _detail(fields, body)
    retry_after_ms = _retry_after_ms(headers)
    if status == 503 and code == "host_lost":
        return HostLost(expert, headers.get("x-coe-host", ""))
    if status == 503 and (typed := _host_error(expert, code, fields, retry_after_ms, waited_ms)):
        return typed
    if status in (401, 403):
        # Such texts quote the key that was refused; it is ours, and the caller must not see it.
        return ExpertFailed(expert, status, "it refused the gateway's credentials", None, code)
    wait_ms = retry_after_ms if status == 429 else None
    return ExpertFailed(expert, status, detail, _text(fields.get("param")), code, wait_ms)


def _host_error(
    expert: str,
    code: str | None,
    fields: Mapping[str, Any],
    retry_after_ms: float,
    waited_ms: float,
) -> CoeError | None:
    """The class behind a code of our own hosts (``deployments.host_http``)."""
    reason = _text(fields.get("reason")) or _detail(fields, b"")
    match code:
        case "queue_full":
            return QueueFull(
                expert,
                int(_number(fields, "depth", 0)),
                _number(fields, "retry_after_ms", retry_after_ms),
            )
        case "deadline_unreachable":
            return DeadlineUnreachable(
                expert,
                wait_ms=_number(fields, "wait_ms", retry_after_ms),
                deadline_ms=_number(fields, "deadline_ms", waited_ms),
                retry_after_ms=_number_or_none(fields, "retry_after_ms"),
            )
        case "host_draining" | "host_unavailable":
            return HostUnavailable(expert, _number(fields, "retry_after_ms", retry_after_ms))
        case "expert_out_of_service" | "canary_mismatch":
            return ExpertOutOfService(expert, reason)
        case "swap_failed":
            return SwapFailed(expert, reason)
    return None


def error_from_event(expert: str, payload: bytes) -> ExpertFailed | None:
    """The error in a stream's event, or None when the event is an ordinary chunk."""
    decoded = _decoded(payload)
    if not isinstance(decoded, dict) or not decoded.get("error"):
        return None
    fields = _error_fields(decoded)
    status = fields.get("code")
    return ExpertFailed(
        expert,
        status if isinstance(status, int) and 400 <= status < 600 else 500,
        _detail(fields, payload),
        _text(fields.get("param")),
        _text(fields.get("code")),
    )


def _decoded(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        return None


def _error_fields(decoded: Any) -> Mapping[str, Any]:
    """OpenAI's ``error`` object; older servers put its fields at the top level."""
    if not isinstance(decoded, dict):
        return {}
    error = decoded.get("error")
    if isinstance(error, dict):
        return error
    if isinstance(error, str):
        return {"message": error}
    return decoded


def _detail(fields: Mapping[str, Any], body: bytes) -> str:
    message = fields.get("message") or fields.get("detail")
    text = message if isinstance(message, str) else body.decode("utf-8", "replace")
    return text[:DETAIL_CHARS_MAX].strip() or "no further detail"


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _number(fields: Mapping[str, Any], name: str, default: float) -> float:
    value = _number_or_none(fields, name)
    return default if value is None else value


def _number_or_none(fields: Mapping[str, Any], name: str) -> float | None:
    value = fields.get(name)
    return float(value) if isinstance(value, int | float) else None


def _retry_after_ms(headers: Mapping[str, str]) -> float:
    try:
        seconds = float(headers.get("retry-after", _RETRY_AFTER_DEFAULT_S))
    except ValueError:  # an HTTP date: rare, and the wait behind it is not worth a parser
        seconds = _RETRY_AFTER_DEFAULT_S
    return max(seconds, 0.0) * 1000.0
