"""Batched metrics show what the library's own would, once they are flushed."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary
from prometheus_client.samples import Sample

from gateway.metric_batches import HistogramByBucket, MetricBatches, SummaryOfMany

BUCKETS = (0.001, 0.01, 1.0)
VALUES = st.one_of(
    st.sampled_from([0.0, *BUCKETS, math.inf]), st.floats(0, 10, allow_subnormal=False)
)


def samples(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    found: list[Sample] = [s for family in registry.collect() for s in family.samples]
    return {(s.name, s.labels.get("le", "")): s.value for s in found if "_created" not in s.name}


@given(st.lists(st.one_of(VALUES, st.none()), max_size=40))
def test_a_flush_shows_what_single_observations_would(values: list[float | None]) -> None:
    """None is a flush in between."""
    batched, plain = CollectorRegistry(), CollectorRegistry()
    batches = MetricBatches()
    counter = batches.added(Counter("c", "x", registry=batched))
    gauge = batches.added(Gauge("g", "x", registry=batched))
    times = batches.observed(HistogramByBucket("h", "x", buckets=BUCKETS, registry=batched))
    sizes = batches.summed(SummaryOfMany("s", "x", registry=batched))
    own_counter, own_gauge = Counter("c", "x", registry=plain), Gauge("g", "x", registry=plain)
    own_times = Histogram("h", "x", buckets=BUCKETS, registry=plain)
    own_sizes = Summary("s", "x", registry=plain)
    for value in values:
        if value is None:
            batches.flush()
            continue
        counter.inc(value)
        gauge.inc(-value)
        times.observe(value)
        sizes.observe(value)
        own_counter.inc(value)
        own_gauge.inc(-value)
        own_times.observe(value)
        own_sizes.observe(value)
    batches.flush()
    shown, expected = samples(batched), samples(plain)
    assert shown.keys() == expected.keys()
    for name, value in expected.items():
        same = shown[name] == value or math.isclose(shown[name], value, rel_tol=1e-9)
        assert same, f"{name}: {shown[name]} instead of {value}"


def test_nothing_shows_before_the_flush_and_nothing_twice_after_it() -> None:
    registry, batches = CollectorRegistry(), MetricBatches()
    counter = batches.added(Counter("c", "x", registry=registry))
    counter.inc()
    assert registry.get_sample_value("c_total") == 0
    batches.flush()
    batches.flush()
    assert registry.get_sample_value("c_total") == 1
