"""An answer that arrives as server-sent events, and the patience with its sender."""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import AsyncIterator

import msgspec

from experts.errors import ExpertFailed, HostLost, UpstreamTimeout
from experts.event_stream import DONE, EventTooLarge, SseDecoder
from experts.http_connection import HttpResponse
from experts.protocol import CallTimings, ExpertCall
from experts.upstream_errors import error_from_event

__all__ = ["HttpStream", "Watchdog"]

_FINISHED = re.compile(rb'"finish_reason"\s*:\s*"')
_TAIL_EVENTS = 4  # where a finish reason stands when a server sends no [DONE]; usage may follow it


class HttpStream:
    """An open answer. Iterate once, either event by event or in ``batches``."""

    def __init__(
        self,
        call: ExpertCall,
        host: str,
        response: HttpResponse,
        timings: CallTimings,
        watchdog: Watchdog,
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


class Watchdog:
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


def _is_json(payload: bytes) -> bool:
    try:
        msgspec.json.decode(payload)
    except msgspec.DecodeError:
        return False
    return True
