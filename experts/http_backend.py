"""Backend over plain HTTP: expert hosts and any other OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from experts.answer_shape import OddAnswer, check_answer
from experts.errors import CoeError, ExpertFailed, HostLost, UpstreamTimeout
from experts.event_stream import DONE, EventTooLarge, SseDecoder
from experts.http_connection import HttpResponse
from experts.http_pool import ConnectTimeout, HttpPool, PoolLimits
from experts.protocol import CallTimings, ExpertCall, ExpertReply
from experts.types import Endpoint
from experts.upstream_errors import error_from_event, error_from_reply

__all__ = ["HttpBackend", "PoolLimits"]

_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
_ERROR_BODY_BYTES_MAX = 64 * 1024
_ERROR_BODY_S = 2.0
_DRAIN_S = 0.25
_TAIL_EVENTS = 4  # where a finish reason stands when a server sends no [DONE]; usage may follow it


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

    async def complete(self, call: ExpertCall) -> ExpertReply:
        """Run to the end.

        Raises:
            ExpertFailed, HostLost, UpstreamTimeout, and the capacity errors a host answers with.
        """
        try:
            async with asyncio.timeout(call.timeout_ms / 1000.0):
                response = await self._post(call, stream=False)
                try:
                    body = await self._read_bounded(call, response, self._limits.reply_bytes_max)
                finally:
                    response.close()
        except TimeoutError as error:
            raise self._timeout(call, error, "total", call.timeout_ms) from error
        except OSError as error:
            raise HostLost(call.expert, self._name) from error
        return ExpertReply(_reply_object(call, body), self._timings(response))

    @asynccontextmanager
    async def stream(self, call: ExpertCall) -> AsyncIterator[HttpStream]:
        """Open a stream; leaving early closes the connection, which aborts the generation."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        limit_ms = min(call.first_token_timeout_ms, call.timeout_ms)
        try:
            async with asyncio.timeout(limit_ms / 1000.0):
                response = await self._post(call, stream=True)
        except TimeoutError as error:
            raise self._timeout(call, error, "first token", limit_ms) from error
        except OSError as error:
            raise HostLost(call.expert, self._name) from error
        watchdog = _Watchdog(loop, response, call, started_s)
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

    def _timeout(
        self, call: ExpertCall, error: TimeoutError, phase: str, limit_ms: float
    ) -> UpstreamTimeout:
        if isinstance(error, ConnectTimeout):
            return UpstreamTimeout(call.expert, "connect", self._limits.connect_timeout_ms)
        return UpstreamTimeout(call.expert, phase, limit_ms)

    async def _post(self, call: ExpertCall, *, stream: bool) -> HttpResponse:
        body = {**call.body, "model": self._upstream_model or call.expert}
        if call.endpoint is not Endpoint.EMBEDDINGS:
            body["stream"] = stream
        if self._pool is None:
            self._pool = HttpPool(self._base_url, self._limits)
        payload = msgspec.json.encode(body)
        response = await self._pool.post(call.endpoint.value, self._headers(call), payload)
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


class HttpStream:
    """An open answer. Iterate once, either event by event or in ``batches``."""

    def __init__(
        self,
        call: ExpertCall,
        host: str,
        response: HttpResponse,
        timings: CallTimings,
        watchdog: _Watchdog,
    ) -> None:
        self._call = call
        self._host = host
        self._response = response
        self._watchdog = watchdog
        self.timings = timings
        self.done = False  # [DONE] was seen
        self._tail: deque[bytes] = deque(maxlen=_TAIL_EVENTS)
        self._events = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for batch in self.batches():
            for payload in batch:
                yield payload

    async def batches(self) -> AsyncIterator[list[bytes]]:
        """Payloads grouped as the network delivered them, so that a relay can write them at once.

        Raises:
            ExpertFailed: the stream carries an error event.
            HostLost: it ended with neither ``[DONE]`` nor a finish reason.
            UpstreamTimeout: first token, idle or total time ran out.
        """
        decoder = SseDecoder()
        while not self.done and (chunk := await self._read()):
            try:
                batch = self._checked(decoder.feed(chunk))
            except EventTooLarge as error:
                raise ExpertFailed(self._call.expert, 502, str(error)) from error
            if batch:
                self._watchdog.arrived()
                yield batch
        if not self.done and (last := self._unended(decoder)):
            yield last
        if not self.done and not any(map(_FINISHED.search, self._tail)):
            raise self._lost()

    async def _read(self) -> bytes:
        self._watchdog.waiting()
        try:
            return await self._response.read()
        except OSError as error:
            if self._watchdog.overrun is not None:
                phase, limit_ms = self._watchdog.overrun
                raise UpstreamTimeout(self._call.expert, phase, limit_ms) from error
            raise self._lost() from error

    def _unended(self, decoder: SseDecoder) -> list[bytes]:
        """The last event of a server that ends its stream without a blank line; only if whole."""
        whole = [one for one in decoder.feed(b"\n\n") if one == DONE or _is_json(one)]
        return self._checked(whole)

    def _checked(self, payloads: list[bytes]) -> list[bytes]:
        batch: list[bytes] = []
        for payload in payloads:
            if payload == DONE:
                self.done = True
                break
            if b'"error"' in payload and (error := error_from_event(self._call.expert, payload)):
                raise error
            if payload.startswith(b"{"):
                batch.append(payload)
            elif text := payload.strip():  # blank data keeps a line alive at some servers
                if not text.startswith(b"{"):
                    raise ExpertFailed(self._call.expert, 502, "an event that is no JSON object")
                batch.append(text)
        self._events += len(batch)
        self._tail.extend(batch)
        return batch

    def _lost(self) -> HostLost:
        return HostLost(self._call.expert, self._host, sent_tokens=self._events)


class _Watchdog:
    """Closes the response when a phase overruns, which wakes the reader with an error.

    Events end a wait; comments do not, or a server that sends nothing else would be waited for
    until the end. Only waiting for the upstream counts as silence: a client that reads
    slowly holds the relay up, and the expert is not to blame for that. One timer per stream that
    re-arms itself; ``waiting`` and ``arrived`` only move a number, because a timeout armed and
    disarmed around every read would cost more than the read.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        response: HttpResponse,
        call: ExpertCall,
        started_s: float,
    ) -> None:
        self._loop = loop
        self._response = response
        self._call = call
        self._end_s = started_s + call.timeout_ms / 1000.0
        self._due_s = min(started_s + call.first_token_timeout_ms / 1000.0, self._end_s)
        self._idle_s = call.idle_timeout_ms / 1000.0
        self._started = False  # an event came at all
        self._answered = False  # and none is being waited for
        self.overrun: tuple[str, float] | None = None
        self._timer = loop.call_at(self._due_s, self._check)

    def waiting(self) -> None:
        """A read begins; the one after an event begins a wait for the next."""
        if self._answered:
            self._answered = False
            self._due_s = min(self._loop.time() + self._idle_s, self._end_s)
            if self._due_s < self._timer.when():
                self._timer.cancel()
                self._timer = self._loop.call_at(self._due_s, self._check)

    def arrived(self) -> None:
        """Events came; until the next read only the total time counts."""
        self._started = self._answered = True
        self._due_s = self._end_s

    def stop(self) -> None:
        self._timer.cancel()

    def _check(self) -> None:
        now_s = self._loop.time()
        if now_s < self._due_s:
            next_s = min(self._due_s, now_s + self._idle_s) if self._started else self._due_s
            self._timer = self._loop.call_at(next_s, self._check)
            return
        self.overrun = self._phase()
        self._response.close()

    def _phase(self) -> tuple[str, float]:
        if self._due_s >= self._end_s:
            return "total", self._call.timeout_ms
        if self._started:
            return "between tokens", self._call.idle_timeout_ms
        return "first token", self._call.first_token_timeout_ms


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


def _is_json(payload: bytes) -> bool:
    try:
        msgspec.json.decode(payload)
    except msgspec.DecodeError:
        return False
    return True


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
