"""Server-sent events on the way out: framing of payloads, the comment that keeps a line alive."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

__all__ = ["DONE_EVENT", "KEEP_ALIVE", "framed", "named_event"]

DONE_EVENT = b"data: [DONE]\n\n"
KEEP_ALIVE = b": waiting\n\n"


def framed(payloads: Iterable[bytes]) -> bytes:
    """One ``data:`` event per payload, in one piece for one write."""
    return b"".join([b"data: " + _one_event(payload) + b"\n\n" for payload in payloads])


def _one_event(payload: bytes) -> bytes:
    """Pretty-printed JSON needs a ``data:`` on each of its lines."""
    return payload.replace(b"\n", b"\ndata: ") if b"\n" in payload else payload


def named_event(name: str, payload: Mapping[str, Any]) -> bytes:
    """One event with a name, as the Responses and the Messages API send them."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), msgspec.json.encode(payload))
