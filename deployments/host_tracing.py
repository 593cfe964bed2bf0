"""An expert host's spans: what one request of a slot waited for, and what its generation took."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

__all__ = ["HostSpans", "StageSpan"]


class StageSpan:
    """The host's part of one stage. With tracing off all of it does nothing."""

    def __init__(self, span: Span | None) -> None:
        self._span = span

    def leased(self, expert: str, queue_ms: float, swap_ms: float) -> None:
        """The expert is resident and the generation has begun to answer."""
        if self._span is not None:
            self._span.set_attributes({"coe.queue_ms": queue_ms, "coe.swap_ms": swap_ms})
            self._span.add_event("first token")
            self._span.set_attribute("gen_ai.response.model", expert)

    def close(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the span, as an exit of a context: an error leaves its class, never its text."""
        if self._span is None:
            return
        if kind is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_attribute("error.type", kind.__name__)
            self._span.set_status(Status(StatusCode.ERROR, kind.__name__))
        self._span.end()


class HostSpans:
    """Opens spans as children of the gateway's; ``tracer`` None: tracing is off."""

    def __init__(self, tracer: Tracer | None, host_id: str) -> None:
        self._tracer = tracer
        self._host_id = host_id

    def begin(self, headers: Mapping[str, str], operation: str, expert: str) -> StageSpan:
        """A span under the ``traceparent`` of ``headers``, to be ended by whoever has it."""
        if self._tracer is None:
            return StageSpan(None)
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        sent = {k: headers[k] for k in ("traceparent", "tracestate") if k in headers}
        span = self._tracer.start_span(
            f"{operation} {expert}",
            TraceContextTextMapPropagator().extract(sent),
            kind=SpanKind.SERVER,
            start_time=time.time_ns(),
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "coe",
                "gen_ai.request.model": expert,
                "coe.host": self._host_id,
            },
        )
        return StageSpan(span)
