"""Labels are bounded, money adds up, and several workers' numbers are one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter

from experts.types import Price, Usage
from gateway.dearest import dearest_cost_micro_usd, dearest_prices
from gateway.metric_registry import Labelled
from gateway.metrics import Metrics

WORKER = """
import sys
from gateway.metrics import Metrics
metrics = Metrics()
for _ in range(int(sys.argv[1])):
    metrics.count_response("/v1/chat/completions", 200)
metrics.set_in_flight(int(sys.argv[1]))
sys.stdout.write(metrics.render().decode())
"""


def test_what_has_too_many_values_is_counted_as_other_and_told() -> None:
    registry, told = CollectorRegistry(), list[str]()
    counter = Counter("things", "x", ["name"], registry=registry)
    labelled = Labelled(counter, lambda child: child, children_max=3, overflowed=told.append)
    for n in range(10):
        labelled(f"n{n}").inc()
    labelled("n0").inc()
    assert registry.get_sample_value("things_total", {"name": "n0"}) == 2
    assert registry.get_sample_value("things_total", {"name": "other"}) == 7
    assert (len(labelled), len(told)) == (4, 7)


def test_the_dearest_expert_depends_on_the_answer() -> None:
    prices = [Price(10, 10), Price(100, 1), Price(1, 100), Price(50, 50), Price(5, 90)]
    front = dearest_prices(prices)
    for usage in (Usage(10**6, 0), Usage(0, 10**6), Usage(10**6, 10**6), Usage(3, 7)):
        every = max(p.cost_micro_usd(usage.input_tokens, usage.output_tokens) for p in prices)
        assert dearest_cost_micro_usd(front, usage) == every
    assert set(front) == {Price(100, 1), Price(50, 50), Price(5, 90), Price(1, 100)}
    assert dearest_cost_micro_usd((), Usage(1, 1)) == 0


def test_one_scrape_tells_of_all_workers_and_forgets_what_dead_ones_held(tmp_path: Path) -> None:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for count in ("3", "4"):
        shown = subprocess.run(
            [sys.executable, "-c", WORKER, count],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout
    answered = 'coe_requests_total{endpoint="/v1/chat/completions",status="200"}'
    assert f"{answered} 7.0" in shown
    assert "coe_in_flight 7.0" in shown  # nobody has said yet that the first one is gone
    code = (
        "import sys; from pathlib import Path; from gateway.metric_registry import forget_worker\n"
        "from prometheus_client import CollectorRegistry; from gateway.metric_registry import *\n"
        "folder = Path(sys.argv[1])\n"
        "for file in folder.glob('gauge_*'): forget_worker(int(file.stem.split('_')[-1]), folder)\n"
        "print(rendered(CollectorRegistry()).decode())"
    )
    after = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    assert f"{answered} 7.0" in after
    assert "coe_in_flight" not in after


def test_a_scrape_has_no_ids_and_no_words_of_users() -> None:
    """Every label that exists, by name: a new one has to be thought about here."""
    allowed = {"category", "code", "digest", "direction", "endpoint", "expert", "kind", "le"}
    allowed |= {"metric", "outcome", "policy", "source", "state", "status", "verdict", "what"}
    metrics = Metrics()
    assert {
        label for names in metrics.registry._collector_to_names for label in _labels(names)
    } <= (allowed)


def _labels(collector: object) -> tuple[str, ...]:
    return tuple(getattr(collector, "_labelnames", ()))
