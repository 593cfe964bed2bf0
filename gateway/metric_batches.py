"""Metrics that a request adds to, written to the library's own in batches.

One request adds to some fifteen metrics. The library takes a lock for each, and with several
workers writes into a shared file; here an addition is an addition, and ``flush`` hands over what
has come together: before each scrape, and every ``FLUSH_S`` for the other workers' scrapes. A
worker that is killed loses at most that much of its counts. For one thread: the event loop's.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TypeVar

from prometheus_client import Counter, Gauge, Histogram, Summary

__all__ = [
    "FLUSH_S",
    "Added",
    "FlushTask",
    "HistogramByBucket",
    "MetricBatches",
    "Observed",
    "SummaryOfMany",
    "Summed",
]

FLUSH_S = 0.25


class HistogramByBucket(Histogram):
    """A histogram that takes many observations at once."""

    def add(self, counts: Sequence[int], total: float) -> None:
        """``counts``: observations by bucket, as many as there are bounds and one more."""
        self._sum.inc(total)
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)

    @property
    def bounds(self) -> tuple[float, ...]:
        """Upper bounds of the buckets; the last one is infinity."""
        return tuple(self._upper_bounds)


class SummaryOfMany(Summary):
    def add(self, count: int, total: float) -> None:
        self._count.inc(count)
        self._sum.inc(total)


class Added:
    """What was added to a counter, or to a gauge that only grows, since the last flush."""

    __slots__ = ("_amount", "_metric")

    def __init__(self, metric: Counter | Gauge) -> None:
        self._metric = metric
        self._amount = 0.0

    def inc(self, amount: float = 1.0) -> None:
        self._amount += amount

    def flush(self) -> None:
        amount, self._amount = self._amount, 0.0
        if amount:
            self._metric.inc(amount)


class Observed:
    """A histogram's observations since the last flush."""

    __slots__ = ("_bounds", "_counts", "_metric", "_total")

    def __init__(self, metric: HistogramByBucket) -> None:
        self._metric = metric
        self._bounds = metric.bounds
        self._counts = [0] * len(self._bounds)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def flush(self) -> None:
        if any(self._counts):
            self._metric.add(self._counts, self._total)
            self._counts = [0] * len(self._bounds)
            self._total = 0.0


class Summed:
    """A summary's observations since the last flush."""

    __slots__ = ("_count", "_metric", "_total")

    def __init__(self, metric: SummaryOfMany) -> None:
        self._metric = metric
        self._count = 0
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._count += 1
        self._total += value

    def flush(self) -> None:
        if self._count:
            self._metric.add(self._count, self._total)
            self._count, self._total = 0, 0.0


T = TypeVar("T", Added, Observed, Summed)


class MetricBatches:
    """Makes metrics that are flushed together. Owns what was added and not yet written."""

    def __init__(self) -> None:
        self._open: list[Added | Observed | Summed] = []

    def added(self, metric: Counter | Gauge) -> Added:
        return self._kept(Added(metric))

    def observed(self, metric: HistogramByBucket) -> Observed:
        return self._kept(Observed(metric))

    def summed(self, metric: SummaryOfMany) -> Summed:
        return self._kept(Summed(metric))

    def flush(self) -> None:
        for one in self._open:
            one.flush()

    def _kept(self, one: T) -> T:
        self._open.append(one)
        return one


class FlushTask:
    """Flushes every ``FLUSH_S``, and at the end."""

    def __init__(self, flush: Callable[[], None]) -> None:
        self._flush = flush
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="metrics-flush")

    async def aclose(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._flush()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            self._flush()
