"""The head of an answer and the beginning of its body in one packet instead of two.

uvicorn writes them apart, and each write is a system call here, a packet on the wire, and a wake-up
at the client. A head waits for what is written next in the same turn of the event loop; if nothing
is, it leaves at the turn's end, so that a stream's head never waits for its first token.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

__all__ = ["JoinedWrites"]

_HEAD: Final = b"HTTP/1.1 "


class JoinedWrites(asyncio.Transport):
    """The transport of one connection. The order of bytes is that of the writes, always."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._held = b""

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        if self._held:
            held, self._held = self._held, b""
            self._transport.writelines((held, data))
        elif data[: len(_HEAD)] == _HEAD:
            self._held = bytes(data)
            self._loop.call_soon(self._flush)
        else:
            self._transport.write(data)

    def _flush(self) -> None:
        held, self._held = self._held, b""
        if held and not self._transport.is_closing():
            self._transport.write(held)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def abort(self) -> None:
        self._held = b""
        self._transport.abort()

    def get_write_buffer_size(self) -> int:
        return len(self._held) + self._transport.get_write_buffer_size()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()
