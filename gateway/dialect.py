"""What differs between the APIs that lead to the same service: how to read, write and refuse.

``gateway.openai_http.AnswerEndpoint`` serves any dialect; OpenAI's own is here, because for it
nothing is translated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from experts.errors import CoeError
from experts.types import Endpoint
from gateway.http_errors import ErrorAnswer, answer_for, error_object
from gateway.journal import Journal
from gateway.sse import DONE_EVENT, KEEP_ALIVE, framed
from gateway.wire import WireRequest, parse_request

__all__ = ["Dialect", "OpenAiDialect", "StreamWriter"]


class StreamWriter(Protocol):
    """Turns the chat chunks of one stream into its bytes; used once."""

    def write(self, payloads: Sequence[bytes]) -> bytes:
        """Raises OddAnswer for a chunk that cannot be translated; nothing of it was taken in."""
        ...

    def end(self) -> bytes:
        """The last bytes of a stream that ended well."""
        ...

    def failed(self, error: CoeError) -> bytes:
        """The last bytes of one that did not."""
        ...


class Dialect(Protocol):
    """One API. Without state; ``name`` is the endpoint's in journals and metrics."""

    @property
    def name(self) -> str: ...

    @property
    def keep_alive(self) -> bytes:
        """What is written into a stream that has nothing to say yet."""
        ...

    def parse(self, raw: bytes) -> WireRequest:
        """Raises InvalidRequest."""
        ...

    def whole(
        self, body: dict[str, Any], request: WireRequest, journal: Journal
    ) -> dict[str, Any]: ...

    def writer(self, request: WireRequest, journal: Journal) -> StreamWriter: ...

    def refusal(self, error: CoeError, journal: Journal) -> ErrorAnswer: ...

    def headers(self, journal: Journal) -> Sequence[tuple[bytes, bytes]]:
        """Response headers that only this API has."""
        ...


class _Untouched:
    """OpenAI's own stream: the chunks as they are, ``[DONE]`` at the end."""

    def write(self, payloads: Sequence[bytes]) -> bytes:
        return framed(payloads)

    def end(self) -> bytes:
        return DONE_EVENT

    def failed(self, error: CoeError) -> bytes:
        return framed([msgspec.json.encode(error_object(error))])


_UNTOUCHED = _Untouched()


class OpenAiDialect:
    """Chat completions, completions or embeddings: requests and answers pass as they are."""

    keep_alive = KEEP_ALIVE

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self.name = endpoint.value

    def parse(self, raw: bytes) -> WireRequest:
        return parse_request(raw, self._endpoint)

    def whole(self, body: dict[str, Any], request: WireRequest, journal: Journal) -> dict[str, Any]:
        return body

    def writer(self, request: WireRequest, journal: Journal) -> StreamWriter:
        return _UNTOUCHED

    def refusal(self, error: CoeError, journal: Journal) -> ErrorAnswer:
        return answer_for(error, spent=journal.paid)

    def headers(self, journal: Journal) -> Sequence[tuple[bytes, bytes]]:
        return ()
