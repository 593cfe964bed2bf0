"""Prometheus metrics of requests, all named ``coe_*``. What is read off instead of counted is in
``gateway.worker_gauges``.

Label values are bounded: no ids, no user input; see ``gateway.metric_registry``. With several
workers every number is the sum over all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from experts.types import MICRO_USD_PER_USD
from gateway.http_errors import row_for
from gateway.journal import Journal, StageNote
from gateway.metric_batches import Added, HistogramByBucket, MetricBatches, Observed, SummaryOfMany
from gateway.metric_registry import Labelled, rendered, total_of

__all__ = ["Metrics"]

_FAST_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_SLOW_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0)
_VERSIONS_MAX = 256  # (policy, digest) pairs that a worker tells apart in its lifetime


class Metrics:
    """All instruments, on one registry. ``observe`` is called once per request, at its end."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        self._batches = MetricBatches()
        self._add_counters()
        self._add_times()
        self._add_policies()
        self._in_flight = Gauge(
            "coe_in_flight",
            "Requests held now",
            registry=self.registry,
            multiprocess_mode="livesum",
        )

    def _add_counters(self) -> None:
        self._overflows = Counter(
            "coe_metric_overflow",
            "Observations under `other`, because a metric had too many label values",
            ["metric"],
            registry=self.registry,
        )
        counter = self.counter
        self._requests = counter("coe_requests", "HTTP responses", ["endpoint", "status"])
        self._errors = counter("coe_errors", "Failed requests", ["code"])
        self._decisions = counter(
            "coe_decisions", "Routing decisions by who answered", ["category", "expert", "policy"]
        )
        self._stages = counter("coe_stages", "Calls of experts", ["expert", "verdict"])
        self._escalations = counter("coe_escalations", "Drafts that were not accepted", ["expert"])
        self._retries = counter("coe_retries", "Calls made again after a pause", ["expert"])
        self._moved = counter("coe_moved_calls", "Waiting calls sent to an idle host", ["expert"])
        self._moves = counter(
            "coe_placement_moves", "Changes of what hosts keep in memory", ["kind", "outcome"]
        )
        self._affinity = counter(
            "coe_affinity", "What became of session affinity", ["outcome", "source"]
        )
        self._tokens = counter("coe_tokens", "Tokens of all stages", ["expert", "direction"])
        self._cost = counter("coe_cost_usd", "Cost of all stages", ["expert"])
        self._dearest = counter(
            "coe_dearest_cost_usd",
            "What the catalogue's dearest expert would have charged for the answers",
            [],
        )()
        self._saved = self._batches.added(
            Gauge(
                "coe_saved_usd",
                "Dearest expert's charge less the cost; falls when drafts cost more than they save",
                registry=self.registry,
                multiprocess_mode="sum",
            )
        )

    def _add_times(self) -> None:
        histogram = self.histogram
        self._router = histogram("coe_router_seconds", "Classification", [], buckets=_FAST_S)()
        self._overhead = histogram(
            "coe_overhead_seconds",
            "What the gateway itself took: a request's time less that of its experts' calls",
            [],
            buckets=_FAST_S,
        )()
        self._queue = histogram("coe_queue_seconds", "Wait at the host", ["expert"])
        self._swap = histogram("coe_swap_seconds", "Swap waited for", ["expert"])
        self._engine_first = histogram(
            "coe_expert_first_token_seconds",
            "From the call to the expert's first token, less queue and swap; streams only",
            ["expert"],
        )
        self._first_token = histogram(
            "coe_first_token_seconds", "Arrival to the first token sent", ["expert"]
        )
        self._total = histogram("coe_request_seconds", "Arrival to the end", ["endpoint"])

    def _add_policies(self) -> None:
        """By version, so that a canary can be compared with what it is to replace."""
        labels = ["policy", "digest"]
        self._policy_requests = self.counter(
            "coe_policy_requests",
            "Requests by version of the policy",
            [*labels, "outcome"],
            children_max=4 * _VERSIONS_MAX,
        )
        self._policy_escalations = self.counter(
            "coe_policy_escalations",
            "Drafts not accepted by version of the policy",
            labels,
            children_max=_VERSIONS_MAX,
        )
        self._policy_cost = self.counter(
            "coe_policy_cost_usd",
            "Cost by version of the policy",
            labels,
            children_max=_VERSIONS_MAX,
        )
        self._policy_seconds = Labelled(
            SummaryOfMany(
                "coe_policy_request_seconds",
                "Arrival to the end by version of the policy",
                labels,
                registry=self.registry,
            ),
            self._batches.summed,
            children_max=_VERSIONS_MAX,
            overflowed=self._count_overflow,
        )

    # --- making instruments ----------------------------------------------------------------------

    def counter(
        self, name: str, text: str, labels: Sequence[str], *, children_max: int = 5_000
    ) -> Labelled[Counter, Added]:
        """A counter with a bounded number of children."""
        metric = Counter(name, text, labels, registry=self.registry)
        return Labelled(
            metric,
            self._batches.added,
            children_max=children_max,
            overflowed=self._count_overflow,
        )

    def histogram(
        self, name: str, text: str, labels: Sequence[str], *, buckets: Sequence[float] = _SLOW_S
    ) -> Labelled[HistogramByBucket, Observed]:
        """A histogram of seconds; the buckets are for what an expert or its host takes."""
        metric = HistogramByBucket(name, text, labels, buckets=buckets, registry=self.registry)
        return Labelled(metric, self._batches.observed, overflowed=self._count_overflow)

    def gauge(
        self, name: str, text: str, labels: Sequence[str], mode: str
    ) -> Labelled[Gauge, Gauge]:
        """``mode``: how the values of several workers become one, as the library names it."""
        metric = Gauge(
            name,
            text,
            labels,
            registry=self.registry,
            multiprocess_mode=mode,  # type: ignore[arg-type]  # one of a Literal's words
        )
        return Labelled(metric, lambda gauge: gauge, overflowed=self._count_overflow)

    def _count_overflow(self, metric: str) -> None:
        self._overflows.labels(metric).inc()

    # --- observing -------------------------------------------------------------------------------

    def count_response(self, endpoint: str, status: int) -> None:
        """``endpoint`` must come from a fixed set of paths."""
        self._requests(endpoint, str(status)).inc()

    def count_move(self, kind: str, outcome: str) -> None:
        """One change of placement that a host was told to make."""
        self._moves(kind, outcome).inc()

    def set_in_flight(self, count: int) -> None:
        self._in_flight.set(count)

    def observe(self, journal: Journal) -> None:
        """Count one finished request."""
        if journal.error is not None:
            self._errors(row_for(journal.error).code).inc()
        if journal.decision is not None:
            self._observe_decision(journal)
        for stage in journal.stages:
            self._observe_stage(stage)
        if journal.stages:
            self._observe_money(journal)
        self._observe_times(journal)

    def flush(self) -> None:
        """Write what was counted to where scrapes, also other workers', find it."""
        self._batches.flush()

    def render(self) -> bytes:
        """The exposition text, over all workers."""
        self.flush()
        return rendered(self.registry)

    def money(self) -> dict[str, float]:
        """US dollars over all workers: spent, what the dearest expert had charged, saved."""
        self.flush()
        names = {
            "spent_usd": "coe_cost_usd_total",
            "dearest_usd": "coe_dearest_cost_usd_total",
            "saved_usd": "coe_saved_usd",
        }
        return {key: total_of(self.registry, sample) for key, sample in names.items()}

    def _observe_decision(self, journal: Journal) -> None:
        assert journal.decision is not None
        plan = journal.decision.plan
        served = journal.served.expert if journal.served else ""
        self._decisions(plan.category, served, plan.policy).inc()
        if journal.decision.classification is not None:
            self._router.observe(journal.router_ms / 1000.0)
        affinity = journal.decision.affinity
        self._affinity(affinity.outcome.value, affinity.source or "none").inc()
        if not journal.stages:  # explained only, or refused before any call
            return
        version = (plan.policy, plan.policy_digest)
        self._policy_requests(*version, journal.outcome).inc()
        self._policy_cost(*version).inc(journal.spent_micro_usd / MICRO_USD_PER_USD)
        escalated = sum(stage.verdict == "escalate" for stage in journal.stages)
        escalations = self._policy_escalations(*version)  # shown as 0 from the first request on
        if escalated:
            escalations.inc(escalated)
        if journal.ended_ms is not None:
            self._policy_seconds(*version).observe((journal.ended_ms - journal.arrived_ms) / 1000.0)

    def _observe_stage(self, stage: StageNote) -> None:
        expert = stage.expert
        self._stages(expert, stage.verdict or "none").inc()
        if stage.verdict == "escalate":
            self._escalations(expert).inc()
        if stage.retries:
            self._retries(expert).inc(stage.retries)
        if stage.moves:
            self._moved(expert).inc(stage.moves)
        self._tokens(expert, "input").inc(stage.usage.input_tokens)
        self._tokens(expert, "output").inc(stage.usage.output_tokens)
        self._cost(expert).inc(stage.cost_micro_usd / MICRO_USD_PER_USD)
        if stage.host:
            self._queue(expert).observe(stage.queue_ms / 1000.0)
            if stage.swap_ms > 0:
                self._swap(expert).observe(stage.swap_ms / 1000.0)
        if stage.first_event_ms is not None:
            waited_ms = stage.first_event_ms - stage.started_ms
            own_ms = max(0.0, waited_ms - stage.queue_ms - stage.swap_ms)
            self._engine_first(expert).observe(own_ms / 1000.0)

    def _observe_money(self, journal: Journal) -> None:
        self._dearest.inc(journal.dearest_micro_usd / MICRO_USD_PER_USD)
        saved = journal.dearest_micro_usd - journal.spent_micro_usd
        self._saved.inc(saved / MICRO_USD_PER_USD)

    def _observe_times(self, journal: Journal) -> None:
        if journal.served is not None and journal.first_token_ms is not None:
            waited_s = (journal.first_token_ms - journal.arrived_ms) / 1000.0
            self._first_token(journal.served.expert).observe(waited_s)
        if journal.ended_ms is not None:
            took_ms = journal.ended_ms - journal.arrived_ms
            self._total(journal.endpoint).observe(took_ms / 1000.0)
            if journal.stages:
                self._overhead.observe(max(0.0, took_ms - journal.experts_ms) / 1000.0)
