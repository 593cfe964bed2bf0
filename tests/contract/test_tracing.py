"""Spans of a request: one tree over gateway and host, no prompt in it unless asked for."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from deployments.host_tracing import HostSpans
from experts.protocol import CallTimings, ExpertCall, ExpertReply
from experts.tracing import open_tracing, tracing_wanted
from gateway.telemetry import JsonFormatter
from gateway.tracing import RequestSpans, TraceContext
from tests.contract.gateway_kit import CASCADE_POLICY, Gateway, make_gateway, spec

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SECRET_WORDS = "the owl flies at midnight"


class Recording:
    """A gateway whose spans are read instead of sent."""

    def __init__(self, folder: Path, *, log_prompts: bool = False) -> None:
        self.exporter = InMemorySpanExporter()
        tracing = open_tracing("test", {}, processor=SimpleSpanProcessor(self.exporter))
        assert tracing is not None
        self.tracer = tracing.tracer
        self.spans_of = RequestSpans(self.tracer, log_prompts=log_prompts)
        self.gateway: Gateway = make_gateway(
            folder,
            [
                spec("draft", "tokens?count=6&confidence=0.02"),
                spec("final", "tokens?count=6&confidence=0.98"),
            ],
            policies={"auto": CASCADE_POLICY},
        )
        service = self.gateway.service
        service._begin_trace = self.spans_of.begin
        service._observers = (*service._observers, self.spans_of.finish)
        self.app = TraceContext(self.gateway.app)

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self.exporter.get_finished_spans()}


@asynccontextmanager
async def calling(app: Any) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


def body(**more: Any) -> dict[str, Any]:
    return {"model": "auto", "messages": [{"role": "user", "content": SECRET_WORDS}], **more}


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    assert span.attributes is not None
    return span.attributes


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cascade_is_one_tree_under_the_callers_span(tmp_path: Path, stream: bool) -> None:
    recording = Recording(tmp_path)
    async with calling(recording.app) as client:
        reply = await client.post(
            "/v1/chat/completions", json=body(stream=stream), headers={"traceparent": PARENT}
        )
        assert reply.status_code == 200
    spans = recording.spans()
    assert set(spans) == {"chat auto", "coe.decide", "chat draft", "chat final"}
    root = spans["chat auto"]
    assert root.parent is not None
    assert f"{root.context.trace_id:032x}-{root.parent.span_id:016x}" in PARENT
    for name in ("coe.decide", "chat draft", "chat final"):
        parent = spans[name].parent
        assert parent is not None
        assert parent.span_id == root.context.span_id
        assert root.start_time <= spans[name].start_time <= spans[name].end_time <= root.end_time
    whole, draft = attributes(root), attributes(spans["chat draft"])
    assert whole["gen_ai.operation.name"] == "chat"
    assert (whole["gen_ai.request.model"], whole["gen_ai.response.model"]) == ("auto", "final")
    assert draft["coe.verdict"] == "escalate"
    journal = recording.gateway.journals[0]
    assert whole["coe.decision_id"] == journal.decision_id
    assert whole["gen_ai.usage.output_tokens"] == journal.usage.output_tokens
    assert whole["coe.cost_micro_usd"] == journal.spent_micro_usd


@pytest.mark.parametrize("log_prompts", [False, True])
async def test_prompts_are_in_spans_only_on_the_operators_word(
    tmp_path: Path, log_prompts: bool
) -> None:
    recording = Recording(tmp_path, log_prompts=log_prompts)
    async with calling(recording.app) as client:
        await client.post("/v1/chat/completions", json=body())
        await client.post("/v1/chat/completions", json=body(temperature="hot"))
    everything = "".join(span.to_json() for span in recording.exporter.get_finished_spans())
    assert (SECRET_WORDS in everything) == log_prompts


async def test_the_call_carries_the_stages_span_and_the_host_goes_on_from_it(
    tmp_path: Path,
) -> None:
    recording, sent = Recording(tmp_path), list[str]()

    class Upstream:
        async def complete(self, call: ExpertCall) -> ExpertReply:
            assert call.traceparent is not None
            sent.append(call.traceparent)
            span = HostSpans(recording.tracer, "h-1").begin(
                {"traceparent": call.traceparent}, "chat", call.expert
            )
            span.leased(call.expert, 12.0, 34.0)
            span.close(None)
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}}
            return ExpertReply(
                {"choices": [choice], "usage": usage}, CallTimings("h-1", 12.0, 34.0)
            )

        async def aclose(self) -> None:
            return None

    recording.gateway.pool._by_expert["final"] = Upstream()  # type: ignore[assignment]
    async with calling(recording.app) as client:
        await client.post("/v1/chat/completions", json=body(model="final"))
    stage, host = recording.exporter.get_finished_spans()[-1], None
    by_id = {s.context.span_id: s for s in recording.exporter.get_finished_spans()}
    host = next(s for s in by_id.values() if attributes(s).get("coe.host") == "h-1")
    assert host.parent is not None
    stage = by_id[host.parent.span_id]
    assert f"{stage.context.span_id:016x}" in sent[0]
    assert attributes(host)["coe.swap_ms"] == attributes(stage)["coe.swap_ms"] == 34.0


async def test_an_error_leaves_its_class_in_the_span(tmp_path: Path) -> None:
    recording = Recording(tmp_path)
    async with calling(recording.app) as client:
        await client.post("/v1/chat/completions", json=body(model="nobody"))
    (span,) = recording.exporter.get_finished_spans()
    assert attributes(span)["error.type"] == "UnknownModel"
    assert span.status.is_unset  # the caller's mistake is no failure of the server


def test_tracing_is_off_unless_the_environment_asks_for_it() -> None:
    asked = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    assert not tracing_wanted({})
    assert open_tracing("x", {}) is None
    assert tracing_wanted(asked)
    assert not tracing_wanted(asked | {"OTEL_SDK_DISABLED": "true"})
    assert not tracing_wanted(asked | {"OTEL_TRACES_EXPORTER": "none"})


async def test_every_log_line_of_a_request_carries_its_ids(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines: list[str] = []

    class Keeping(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(JsonFormatter().format(record))

    gateway = make_gateway(tmp_path, [spec("echo")])
    handler, log = Keeping(), logging.getLogger("somebody.else")
    log.addHandler(handler)
    gateway.service._observers = (lambda _: log.warning("met trouble, Bearer abcdefghijk123"),)
    try:
        async with calling(gateway.app) as client:
            await client.post(
                "/v1/chat/completions", json=body(), headers={"x-request-id": "req-7"}
            )
    finally:
        log.removeHandler(handler)
    assert '"request_id":"req-7","decision_id":"decision-0"' in lines[0]
    assert "abcdefghijk123" not in lines[0]
