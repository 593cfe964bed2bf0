"""Backend over plain HTTP: expert hosts and any other OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from experts.answer_shape import OddAnswer, check_answer
from experts.errors import (
    CoeError,
    ConnectionPoolFull,
    ExpertFailed,
    HostLost,
    UpstreamTimeout,
)
from experts.http_connection import HttpResponse
from experts.http_pool import ConnectTimeout, HttpPool, PoolFull, PoolLimits
from experts.http_stream import HttpStream, Watchdog
from experts.protocol import CallTimings, ExpertCall, ExpertReply
from experts.types import Endpoint
from experts.upstream_errors import error_from_reply

__all__ = ["HttpBackend", "PoolLimits"]

log = logging.getLogger(__name__)

_ERROR_BODY_BYTES_MAX = 64 * 1024
_ERROR_BODY_S = 2.0
_DRAIN_S = 0.25
_COMPLAINT_EVERY_S = 10.0  # an outage is many calls; one line says it


class HttpBackend:
    """Calls ``base_url`` (ending in /v1) with the OpenAI protocol.

    ``secret`` is asked for the bearer token at each call, so that a rotated key needs no restart.
    ``upstream_model`` replaces the expert's id as ``model`` (None: the id itself is sent).
    ``host`` is the expert host's id; given, the scheduling headers of our hosts are sent along.
    The connection pool is opened by the first call and belongs to that call's event loop.
    """

    def __init__(
        self,
        base_url: str,
        *,
        secret: Callable[[], str | None] | None = None,
        upstream_model: str | None = None,
        host: str | None = None,
        limits: PoolLimits | None = None,
    ) -> None:
        self._base_url = base_url.rstrip("/")
        self._secret = secret
        self._upstream_model = upstream_model
        self._host = host
        self._limits = limits or PoolLimits()
        self._pool: HttpPool | None = None
        self._silent_until_s = 0.0

    async def complete(self, call: ExpertCall) -> ExpertReply:
        """Run to the end.

        Raises:
            ExpertFailed, HostLost, UpstreamTimeout, ConnectionPoolFull, and the capacity errors a
            host answers with.
        """
        try:
            response = await self._post(call, stream=False, within_ms=call.timeout_ms)
            try:
                body = await self._read_bounded(call, response, self._limits.reply_bytes_max)
            finally:
                response.close()
        except TimeoutError as error:
            raise self._timeout(call, error, "total", call.timeout_ms) from error
        except OSError as error:
            raise self._lost(call, error) from error
        return ExpertReply(_reply_object(call, body), self._timings(response))

    @asynccontextmanager
    async def stream(self, call: ExpertCall) -> AsyncIterator[HttpStream]:
        """Open a stream; leaving early closes the connection, which aborts the generation."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        limit_ms = min(call.first_token_timeout_ms, call.timeout_ms)
        try:
            response = await self._post(call, stream=True, within_ms=limit_ms)
            response.until(None)  # from here on it is the watchdog's
        except TimeoutError as error:
            raise self._timeout(call, error, "first token", limit_ms) from error
        except OSError as error:
            raise self._lost(call, error) from error
        watchdog = Watchdog(loop, response, call, started_s)
        stream = HttpStream(call, self._name, response, self._timings(response), watchdog)
        try:
            yield stream
            if stream.done:
                await _drain(response)
        finally:
            watchdog.stop()
            response.close()

    async def aclose(self) -> None:
        """Close the pool; streams that are still open lose their connection."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    @property
    def _name(self) -> str:
        return self._host or self._base_url

    def _lost(self, call: ExpertCall, error: OSError) -> HostLost:
        """The caller is told that much; the operator why: a name, a port, a certificate."""
        now_s = asyncio.get_running_loop().time()
        if now_s >= self._silent_until_s:
            self._silent_until_s = now_s + _COMPLAINT_EVERY_S
            why = f"{type(error).__name__}: {error}"
            log.warning("expert %s cannot be reached at %s: %s", call.expert, self._name, why)
        return HostLost(call.expert, self._name)

    def _timeout(
        self, call: ExpertCall, error: TimeoutError, phase: str, limit_ms: float
    ) -> CoeError:
        if isinstance(error, PoolFull):
            limit = self._limits.connections_max
            return ConnectionPoolFull(call.expert, limit, error.waited_s * 1000.0)
        if isinstance(error, ConnectTimeout):
            return UpstreamTimeout(call.expert, "connect", self._limits.connect_timeout_ms)
        return UpstreamTimeout(call.expert, phase, limit_ms)

    async def _post(self, call: ExpertCall, *, stream: bool, within_ms: float) -> HttpResponse:
        body = {**call.body, "model": self._upstream_model or call.expert}
        if call.endpoint is not Endpoint.EMBEDDINGS:
            body["stream"] = stream
        if self._pool is None:
            self._pool = HttpPool(self._base_url, self._limits)
        payload = msgspec.json.encode(body)
        response = await self._pool.post(
            call.endpoint.value, self._headers(call), payload, within_s=within_ms / 1000.0
        )
        try:
            # A redirect is not followed: it would carry the bearer token elsewhere.
            if response.status >= 300:
                raise await self._refusal(call, response)
            if (coding := response.headers.get("content-encoding", "identity")) != "identity":
                raise ExpertFailed(
                    call.expert, 502, f"a reply in {coding}, which was not asked for"
                )
        except BaseException:
            response.close()
            raise
        return response

    async def _refusal(self, call: ExpertCall, response: HttpResponse) -> CoeError:
        return error_from_reply(
            expert=call.expert,
            status=response.status,
            headers=response.headers,
            body=await _error_body(response),
            waited_ms=call.queue_deadline_ms or call.timeout_ms,
        )

    async def _read_bounded(
        self, call: ExpertCall, response: HttpResponse, limit_bytes: int
    ) -> bytes:
        parts: list[bytes] = []
        size = 0
        while part := await response.read():
            parts.append(part)
            size += len(part)
            if size > limit_bytes:
                raise ExpertFailed(call.expert, 502, f"a reply of more than {limit_bytes} bytes")
        return b"".join(parts)

    def _headers(self, call: ExpertCall) -> dict[str, str]:
        headers = {"x-request-id": call.request_id}
        if call.traceparent is not None:
            headers["traceparent"] = call.traceparent
        if self._secret is not None and (secret := self._secret()):
            # Secrets mounted from files often end with a line feed.
            headers["authorization"] = f"Bearer {secret.strip()}"
        if self._host is not None:
            headers["x-coe-priority"] = str(call.priority)
            if call.queue_deadline_ms is not None:
                headers["x-coe-queue-deadline-ms"] = f"{call.queue_deadline_ms:.0f}"
            if call.likely_next is not None:
                headers["x-coe-likely-next"] = call.likely_next
        return headers

    def _timings(self, response: HttpResponse) -> CallTimings:
        headers = response.headers
        return CallTimings(
            host=headers.get("x-coe-host", self._host or ""),
            queue_ms=_milliseconds(headers, "x-coe-queue-ms"),
            swap_ms=_milliseconds(headers, "x-coe-swap-ms"),
        )


def _reply_object(call: ExpertCall, body: bytes) -> dict[str, Any]:
    try:
        decoded = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ExpertFailed(call.expert, 502, "a reply that is not JSON") from error
    if not isinstance(decoded, dict):
        raise ExpertFailed(call.expert, 502, "a reply that is not a JSON object")
    try:
        check_answer(decoded)
    except OddAnswer as error:
        raise ExpertFailed(call.expert, 502, str(error)) from error
    return decoded


def _milliseconds(headers: Mapping[str, str], name: str) -> float:
    try:
        return float(headers.get(name, 0.0))
    except ValueError:
        return 0.0


async def _error_body(response: HttpResponse) -> bytes:
    """As much of it as comes: the verdict is the status, which is known already."""
    body = bytearray()
    with contextlib.suppress(OSError):  # a TimeoutError is one
        async with asyncio.timeout(_ERROR_BODY_S):
            while len(body) < _ERROR_BODY_BYTES_MAX and (part := await response.read()):
                body += part
    return bytes(body[:_ERROR_BODY_BYTES_MAX])


async def _drain(response: HttpResponse) -> None:
    """Read the end of the body after ``[DONE]``, so that the connection can be used again."""
    try:
        async with asyncio.timeout(_DRAIN_S):
            while await response.read():
                pass
    except OSError:
        return  # the answer is complete; the connection is simply not kept
