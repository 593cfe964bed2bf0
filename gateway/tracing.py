"""A request's spans, by OpenTelemetry's conventions for generative AI.

    chat auto                 SERVER    the whole request
    ├── coe.decide            INTERNAL  key, body, classification, plan
    ├── chat general          CLIENT    a stage: one call of an expert, a draft perhaps
    └── chat math             CLIENT    the next one

The times are the journal's, so spans, log lines, decision records and metrics cannot disagree. Only
the ids have to exist before a call, because the call carries them. Prompts are not in spans unless
the operator asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from opentelemetry import trace
from opentelemetry.context import attach, detach
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Receive, Scope, Send

from experts.tracing import operation
from gateway.http_errors import row_for
from gateway.journal import Journal, StageNote

if TYPE_CHECKING:
    from opentelemetry.util.types import AttributeValue

__all__ = ["RequestSpans", "TraceContext", "Tracer"]

PROMPT_CHARS_MAX = 16_384
_PASSED = (b"traceparent", b"tracestate")
_PROPAGATOR = TraceContextTextMapPropagator()


class TraceContext:
    """Pure ASGI middleware: the caller's span becomes the parent of ours. Only while tracing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = {
            name.decode("latin-1"): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in _PASSED
        }
        token = attach(_PROPAGATOR.extract(sent))
        try:
            await self._app(scope, receive, send)
        finally:
            detach(token)


class RequestSpans:
    """Makes spans from journals: ``begin`` when one opens, ``finish`` when it closes."""

    def __init__(self, tracer: Tracer, *, log_prompts: bool = False) -> None:
        self._tracer = tracer
        self._log_prompts = log_prompts

    def begin(self, journal: Journal) -> None:
        """Open the request's span under the caller's, if it sent one."""
        name = operation(journal.endpoint)
        span = self._tracer.start_span(
            name, kind=SpanKind.SERVER, start_time=_ns(journal, journal.arrived_ms)
        )
        journal.trace = _Spans(self._tracer, journal, span)

    def finish(self, journal: Journal) -> None:
        """Complete all spans of a closed journal."""
        spans = journal.trace
        if not isinstance(spans, _Spans):
            return
        root = spans.root
        if root.is_recording():
            model = journal.request.model if journal.request is not None else ""
            root.update_name(f"{operation(journal.endpoint)} {model}")
            root.set_attributes(_request_attributes(journal))
            if self._log_prompts:
                root.set_attributes(_prompt(journal))
        self._add_decision(spans)
        for note, span in spans.stages:
            _end_stage(journal, note, span)
        _note_error(root, journal)
        root.end(_ns(journal, journal.ended_ms))

    def _add_decision(self, spans: _Spans) -> None:
        journal = spans.journal
        if journal.decided_ms is None or journal.decision is None:
            return
        span = self._tracer.start_span(
            "coe.decide", spans.context, start_time=_ns(journal, journal.arrived_ms)
        )
        span.set_attributes(
            {
                "coe.category": journal.decision.plan.category,
                "coe.router_ms": round(journal.router_ms, 3),
                "coe.plan": [stage.expert for stage in journal.decision.plan.stages],
            }
        )
        span.end(_ns(journal, journal.decided_ms))


class _Spans:
    """The spans of one running request."""

    def __init__(self, tracer: Tracer, journal: Journal, root: Span) -> None:
        self._tracer = tracer
        self.journal = journal
        self.root = root
        self.context = trace.set_span_in_context(root)
        self.stages: list[tuple[StageNote, Span]] = []
        self.trace_id = trace.format_trace_id(root.get_span_context().trace_id)

    def began_stage(self, stage: StageNote) -> str:
        """Open the stage's span; what it returns makes the expert's spans its children."""
        span = self._tracer.start_span(
            f"{operation(self.journal.endpoint)} {stage.expert}",
            self.context,
            kind=SpanKind.CLIENT,
            start_time=_ns(self.journal, stage.started_ms),
        )
        self.stages.append((stage, span))
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
        return carrier["traceparent"]


# --- attributes ----------------------------------------------------------------------------------


def _request_attributes(journal: Journal) -> dict[str, AttributeValue]:
    total = journal.usage
    found: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": operation(journal.endpoint),
        "gen_ai.provider.name": "coe",
        "gen_ai.response.model": journal.served.expert if journal.served else None,
        "gen_ai.usage.input_tokens": total.input_tokens,
        "gen_ai.usage.output_tokens": total.output_tokens,
        "coe.request_id": journal.request_id,
        "coe.decision_id": journal.decision_id,
        "coe.key_id": journal.access.key.id if journal.access.key else None,
        "coe.outcome": journal.outcome,
        "coe.cost_micro_usd": journal.spent_micro_usd,
        "coe.stages": len(journal.stages),
    }
    if (request := journal.request) is not None:
        found |= {
            "gen_ai.request.model": request.model,
            "gen_ai.request.stream": request.stream,
            "gen_ai.request.max_tokens": request.max_output_tokens,
            "gen_ai.conversation.id": request.coe.session_id,
        }
    if journal.decision is not None:
        plan = journal.decision.plan
        found |= {"coe.policy": plan.policy, "coe.policy.digest": plan.policy_digest}
    if journal.first_token_ms is not None:
        waited_ms = journal.first_token_ms - journal.arrived_ms
        found["gen_ai.response.time_to_first_chunk"] = waited_ms / 1000.0
    return {name: value for name, value in found.items() if value is not None}


def _prompt(journal: Journal) -> dict[str, AttributeValue]:
    """The conversation as it was sent, cut to a bound. Only on the operator's word."""
    if journal.request is None:
        return {}
    body = journal.request.body
    sent: Any = next((body[k] for k in ("messages", "prompt", "input") if k in body), None)
    return {"gen_ai.input.messages": msgspec.json.encode(sent).decode()[:PROMPT_CHARS_MAX]}


def _end_stage(journal: Journal, note: StageNote, span: Span) -> None:
    found: dict[str, AttributeValue | None] = {
        "gen_ai.operation.name": operation(journal.endpoint),
        "gen_ai.provider.name": "coe",
        "gen_ai.request.model": note.expert,
        "gen_ai.response.model": note.expert,
        "gen_ai.usage.input_tokens": note.usage.input_tokens,
        "gen_ai.usage.output_tokens": note.usage.output_tokens,
        "server.address": note.host or None,
        "coe.verdict": note.verdict,
        "coe.queue_ms": note.queue_ms,
        "coe.swap_ms": note.swap_ms,
        "coe.retries": note.retries,
        "coe.cost_micro_usd": note.cost_micro_usd,
        "error.type": note.error,
    }
    span.set_attributes({name: value for name, value in found.items() if value is not None})
    if note.error is not None:
        span.set_status(Status(StatusCode.ERROR, note.error))
    if note.first_event_ms is not None:
        span.add_event("first token", timestamp=_ns(journal, note.first_event_ms))
    span.end(_ns(journal, note.ended_ms if note.ended_ms is not None else journal.ended_ms))


def _note_error(span: Span, journal: Journal) -> None:
    """The class of the error, not its text: that may quote what a caller has sent."""
    if journal.error is None:
        return
    kind = type(journal.error).__name__
    span.set_attribute("error.type", kind)
    if row_for(journal.error).status >= 500:
        span.set_status(Status(StatusCode.ERROR, kind))


def _ns(journal: Journal, at_ms: float | None) -> int:
    """A monotonic moment of the journal as nanoseconds since the epoch."""
    since_ms = (at_ms if at_ms is not None else journal.arrived_ms) - journal.arrived_ms
    return journal.wall_ms * 1_000_000 + int(since_ms * 1_000_000)
