"""Where metrics are kept: in this process, or in files that all workers of a gateway share.

With several workers a scrape is answered by any one of them, so each must be able to answer for
all. prometheus-client's multiprocess mode does that: every worker writes its numbers into files of
its own, and whoever is scraped adds all files up. The variable that switches it on has to be set
before the library is imported, so the supervisor sets it in the environment of its workers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from gateway.metric_batches import HistogramByBucket, SummaryOfMany

__all__ = [
    "CHILDREN_MAX",
    "FOLDER_ENV",
    "OTHER",
    "Labelled",
    "forget_worker",
    "rendered",
    "total_of",
]

FOLDER_ENV = "PROMETHEUS_MULTIPROC_DIR"
CHILDREN_MAX = 5_000
OTHER = "other"

M = TypeVar("M", Counter, Gauge, HistogramByBucket, SummaryOfMany)
C = TypeVar("C")


def rendered(registry: CollectorRegistry, environ: Mapping[str, str] = os.environ) -> bytes:
    """The exposition text: of all workers, where there are several, else of ``registry``."""
    return generate_latest(_of_all_workers(registry, environ))


def total_of(
    registry: CollectorRegistry, sample: str, environ: Mapping[str, str] = os.environ
) -> float:
    """The sum of one sample over all labels and all workers, such as ``coe_cost_usd_total``."""
    families = _of_all_workers(registry, environ).collect()
    return sum(s.value for family in families for s in family.samples if s.name == sample)


def _of_all_workers(registry: CollectorRegistry, environ: Mapping[str, str]) -> CollectorRegistry:
    folder = environ.get(FOLDER_ENV)
    if folder is None:
        return registry
    shared = CollectorRegistry()
    MultiProcessCollector(shared, path=folder)  # type: ignore[no-untyped-call]
    return shared


def forget_worker(pid: int, folder: Path) -> None:
    """A worker has ended: what it held is gone. What it has counted stays counted."""
    mark_process_dead(pid, path=str(folder))  # type: ignore[no-untyped-call]


class Labelled(Generic[M, C]):
    """A metric with labels: children are looked up once, and there are never too many of them.

    ``of_child`` makes what callers get of each child: itself, or what batches its numbers. The
    library's ``labels`` locks and builds strings at each call, hence the table. From
    ``children_max`` on, new combinations of values count as ``other``, and ``overflowed`` is told
    the metric's name: whatever a label is made of, memory and scrapes stay bounded.
    """

    def __init__(
        self,
        metric: M,
        of_child: Callable[[M], C],
        *,
        children_max: int = CHILDREN_MAX,
        overflowed: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self._metric: M = metric
        self._of_child: Callable[[M], C] = of_child
        self._children: dict[tuple[str, ...], C] = {}
        self._children_max = children_max
        self._overflowed = overflowed

    def __call__(self, *values: str) -> C:
        child = self._children.get(values)
        return self._added(values) if child is None else child

    def __len__(self) -> int:
        return len(self._children)

    def known(self) -> frozenset[tuple[str, ...]]:
        """Every combination of values seen so far."""
        return frozenset(self._children)

    def _added(self, values: tuple[str, ...]) -> C:
        if len(self._children) >= self._children_max:
            self._overflowed(self._metric._name)
            values = (OTHER,) * len(values)
            if (folded := self._children.get(values)) is not None:
                return folded
        metric = self._metric.labels(*values) if values else self._metric
        child = self._children[values] = self._of_child(metric)
        return child
