"""OpenTelemetry traces, for gateways and expert hosts alike: switched on by the standard variables.

Nothing of OpenTelemetry is imported while tracing is off, which it is by default. The variables are
those of the OpenTelemetry specification: ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or ``…_TRACES_ENDPOINT``)
turns tracing on, ``OTEL_EXPORTER_OTLP_HEADERS`` carries credentials, ``OTEL_TRACES_SAMPLER`` and
``OTEL_TRACES_SAMPLER_ARG`` choose what is sampled, ``OTEL_SDK_DISABLED`` turns all of it off.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.trace import Tracer

__all__ = ["Tracing", "open_tracing", "operation", "tracing_wanted"]

log = logging.getLogger(__name__)

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_FLUSH_S = 3.0
_OPERATIONS = {
    "chat/completions": "chat",
    "completions": "text_completion",
    "embeddings": "embeddings",
    "responses": "chat",
    "messages": "chat",
}


def operation(endpoint: str) -> str:
    """The endpoint as the conventions for generative AI call it."""
    return _OPERATIONS.get(endpoint, endpoint)


class Tracing:
    """A tracer and what sends its spans. Spans go through a bounded queue, on a thread of its own:
    a collector that is slow or away costs spans, never a request's time.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self.tracer: Tracer = provider.get_tracer("coe")

    async def aclose(self) -> None:
        """Send what waits, for a bounded time."""
        closing = asyncio.create_task(asyncio.to_thread(self._provider.shutdown))
        done, _ = await asyncio.wait({closing}, timeout=_FLUSH_S)
        if not done:
            log.warning("the trace collector does not take the last spans")


def tracing_wanted(environ: Mapping[str, str]) -> bool:
    """Whether the environment asks for traces."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environ.get("OTEL_TRACES_EXPORTER", "otlp") == "none":
        return False
    return any(environ.get(name) for name in _ENDPOINTS)


def open_tracing(
    service: str, environ: Mapping[str, str], *, processor: SpanProcessor | None = None
) -> Tracing | None:
    """A tracer for ``service``; None when nobody asks for traces.

    ``processor`` takes the place of the exporter that the environment names; tests read spans from
    one. The exporter reads the process's own environment, as OpenTelemetry's libraries do.
    """
    if processor is None and not tracing_wanted(environ):
        return None
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider

    name = environ.get("OTEL_SERVICE_NAME") or service
    provider = TracerProvider(
        resource=Resource.create({SERVICE_NAME: name}), shutdown_on_exit=False
    )
    provider.add_span_processor(processor or _exporting())
    return Tracing(provider)


def _exporting() -> SpanProcessor:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return BatchSpanProcessor(OTLPSpanExporter())
