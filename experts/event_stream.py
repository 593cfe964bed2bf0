"""Incremental decoder for server-sent events: bytes cut anywhere in, ``data`` payloads out.

Follows the event-stream grammar of the WHATWG HTML standard, section 9.2.6, as far as OpenAI
streams use it: LF, CRLF and CR line ends, comments, several ``data`` lines per event. The fields
``event``, ``id`` and ``retry`` are read over.
"""

from __future__ import annotations

__all__ = ["DONE", "EventTooLarge", "SseDecoder"]

DONE = b"[DONE]"
EVENT_BYTES_MAX = 16 * 1024 * 1024


class EventTooLarge(ValueError):
    """An event grew past the bound without ending; the peer is broken or hostile."""


class SseDecoder:
    """Feed network reads, get the payloads of the events that are complete by now."""

    def __init__(self, event_bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._event_bytes_max = event_bytes_max
        self._rest = b""
        self._skip_lf = False

    @property
    def pending(self) -> bool:
        """True while an unfinished event is buffered."""
        return bool(self._rest.strip())

    def feed(self, chunk: bytes) -> list[bytes]:
        """Payloads completed by ``chunk``, in order.

        Raises:
            EventTooLarge: an unfinished event exceeds the bound.
        """
        data = self._rest + self._with_lf_only(chunk) if self._rest else self._with_lf_only(chunk)
        *blocks, self._rest = data.split(b"\n\n")
        if len(self._rest) > self._event_bytes_max:
            raise EventTooLarge(f"event of more than {self._event_bytes_max} bytes")
        return [payload for block in blocks if (payload := _payload(block)) is not None]

    def _with_lf_only(self, chunk: bytes) -> bytes:
        # JSON escapes carriage returns, so a raw one is always a line end. A CR that ends a read
        # counts as a line end at once; the LF that may open the next read is then dropped.
        if self._skip_lf and chunk:
            self._skip_lf = False
            if chunk.startswith(b"\n"):
                chunk = chunk[1:]
        if b"\r" not in chunk:
            return chunk
        self._skip_lf = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _payload(block: bytes) -> bytes | None:
    if block.startswith(b"data: ") and b"\n" not in block:  # what nearly every server sends
        return block[6:]
    lines = [value for line in block.split(b"\n") if (value := _data_value(line)) is not None]
    return b"\n".join(lines) if lines else None


def _data_value(line: bytes) -> bytes | None:
    if line == b"data":
        return b""
    if not line.startswith(b"data:"):
        return None
    return line[6:] if line.startswith(b"data: ") else line[5:]
