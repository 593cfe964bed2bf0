"""Prometheus metrics, all named ``coe_*``. Label values are bounded: no ids, no user input."""

from __future__ import annotations

from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from experts.types import MICRO_USD_PER_USD
from gateway.http_errors import row_for
from gateway.journal import Journal, StageNote

__all__ = ["Metrics"]

M = TypeVar("M", Counter, Histogram)

_FAST_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_SLOW_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0)


class _Labelled(Generic[M]):
    """A metric whose children are looked up once: ``labels`` locks and builds strings each time."""

    def __init__(self, metric: M) -> None:
        self._metric: M = metric
        self._children: dict[tuple[str, ...], M] = {}

    def __call__(self, *values: str) -> M:
        child = self._children.get(values)
        if child is None:
            child = self._children[values] = self._metric.labels(*values)
        return child


class Metrics:
    """All instruments, on one registry. ``observe`` is called once per request, at its end."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        reg = self.registry
        self._requests = _Labelled(
            Counter("coe_requests", "HTTP responses", ["endpoint", "status"], registry=reg)
        )
        self._errors = _Labelled(Counter("coe_errors", "Failed requests", ["code"], registry=reg))
        self._decisions = _Labelled(
            Counter(
                "coe_decisions", "Routing decisions", ["category", "expert", "policy"], registry=reg
            )
        )
        self._stages = _Labelled(
            Counter("coe_stages", "Calls of experts", ["expert", "verdict"], registry=reg)
        )
        self._escalations = _Labelled(
            Counter("coe_escalations", "Drafts that were not accepted", ["expert"], registry=reg)
        )
        self._tokens = _Labelled(
            Counter("coe_tokens", "Tokens of all stages", ["expert", "direction"], registry=reg)
        )
        self._cost = _Labelled(
            Counter("coe_cost_usd", "Cost of all stages", ["expert"], registry=reg)
        )
        self._router = Histogram(
            "coe_router_seconds", "Classification", buckets=_FAST_S, registry=reg
        )
        self._queue = _Labelled(
            Histogram(
                "coe_queue_seconds", "Wait at the host", ["expert"], buckets=_SLOW_S, registry=reg
            )
        )
        self._swap = _Labelled(
            Histogram(
                "coe_swap_seconds", "Swap waited for", ["expert"], buckets=_SLOW_S, registry=reg
            )
        )
        self._first_token = _Labelled(
            Histogram(
                "coe_first_token_seconds",
                "Arrival to the first token",
                ["expert"],
                buckets=_SLOW_S,
                registry=reg,
            )
        )
        self._total = _Labelled(
            Histogram(
                "coe_request_seconds",
                "Arrival to the end",
                ["endpoint"],
                buckets=_SLOW_S,
                registry=reg,
            )
        )
        self._in_flight = Gauge(
            "coe_in_flight", "Requests held now", registry=reg, multiprocess_mode="livesum"
        )

    def count_response(self, endpoint: str, status: int) -> None:
        """``endpoint`` must come from a fixed set of paths."""
        self._requests(endpoint, str(status)).inc()

    def set_in_flight(self, count: int) -> None:
        self._in_flight.set(count)

    def observe(self, journal: Journal) -> None:
        """Count one finished request."""
        if journal.error is not None:
            self._errors(row_for(journal.error).code).inc()
        if journal.decision is not None:
            plan = journal.decision.plan
            served = journal.served.expert if journal.served else ""
            self._decisions(plan.category, served, plan.policy).inc()
            if journal.decision.classification is not None:
                self._router.observe(journal.router_ms / 1000.0)
        for stage in journal.stages:
            self._observe_stage(stage)
        self._observe_times(journal)

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self.registry)

    def _observe_stage(self, stage: StageNote) -> None:
        expert = stage.expert
        self._stages(expert, stage.verdict or "none").inc()
        if stage.verdict == "escalate":
            self._escalations(expert).inc()
        self._tokens(expert, "input").inc(stage.usage.input_tokens)
        self._tokens(expert, "output").inc(stage.usage.output_tokens)
        self._cost(expert).inc(stage.cost_micro_usd / MICRO_USD_PER_USD)
        if stage.host:
            self._queue(expert).observe(stage.queue_ms / 1000.0)
            if stage.swap_ms > 0:
                self._swap(expert).observe(stage.swap_ms / 1000.0)

    def _observe_times(self, journal: Journal) -> None:
        if journal.served is not None and journal.first_token_ms is not None:
            waited_s = (journal.first_token_ms - journal.arrived_ms) / 1000.0
            self._first_token(journal.served.expert).observe(waited_s)
        if journal.ended_ms is not None:
            took_s = (journal.ended_ms - journal.arrived_ms) / 1000.0
            self._total(journal.endpoint).observe(took_s)
