"""Time of one scheduling decision: 150 experts, 10,000 requests waiting, one slot.

Each decision is one event (an arrival, a finish, a cancel or a finished swap) with everything that
follows from it: expiry, choice of target, grants and the next wake-up. The world's clock is
simulated and the queue is kept at its size. Timed is the thread's processor time inside the
scheduler, so that other work on the machine does not show.

    python bench/scheduler.py [--json FILE] [--experts 150] [--queued 10000] [--decisions 20000]
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import _report
from deployments.swap.core import Scheduler, SchedulerConfig
from deployments.swap.effects import BeginSwap, Effect, Grant, Refuse

SWAP_MS = 400.0
BETWEEN_EVENTS_MS = 1.0


class Load:
    """Keeps one scheduler at a constant queue and times each of its decisions."""

    def __init__(self, experts: int, queued: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.experts = [f"expert-{n}" for n in range(experts)]
        config = SchedulerConfig(queue_max=2 * queued, queue_wait_ms_max=1e9)
        self.scheduler = Scheduler(config, self.experts, self.experts[0])
        self.queued = queued
        self.now_ms = 0.0
        self.arrived = 0
        self.refused = 0
        self.waiting: OrderedDict[str, None] = OrderedDict()
        self.running: OrderedDict[str, None] = OrderedDict()
        self.swap: tuple[str, float] | None = None
        self.took_us: dict[str, list[float]] = defaultdict(list)

    def fill(self) -> None:
        while len(self.waiting) < self.queued:
            self.arrive()
        self.took_us.clear()

    def step(self) -> None:
        """The next event that the load calls for."""
        self.now_ms += BETWEEN_EVENTS_MS
        if self.swap is not None and self.swap[1] <= self.now_ms:
            expert, self.swap = self.swap[0], None
            self.timed("swap_done", lambda: self.scheduler.swap_done(expert, self.now_ms, SWAP_MS))
        elif len(self.waiting) < self.queued:
            self.arrive()
        elif self.running and self.rng.random() < 0.7:
            name = self._take(self.running)
            self.timed("finish", lambda: self.scheduler.finish(name, self.now_ms))
        else:
            name = self._take(self.waiting)
            self.timed("cancel", lambda: self.scheduler.cancel(name, self.now_ms))

    def _take(self, names: OrderedDict[str, None]) -> str:
        """Some name: the oldest half the time, else the youngest."""
        name = next(iter(names)) if self.rng.random() < 0.5 else next(reversed(names))
        del names[name]
        return name

    def arrive(self) -> None:
        self.arrived += 1
        name, expert = f"r{self.arrived}", self.rng.choice(self.experts)
        priority = self.rng.choice((0, 0, 0, 1))
        self.waiting[name] = None
        self.timed(
            "arrive",
            lambda: self.scheduler.arrive(name, expert, priority=priority, now_ms=self.now_ms),
        )

    def timed(self, kind: str, event: Callable[[], list[Effect]]) -> None:
        began_ns = time.thread_time_ns()
        effects = event()
        self.took_us[kind].append((time.thread_time_ns() - began_ns) / 1_000)
        for effect in effects:
            if isinstance(effect, Grant):
                self.running[effect.request_id] = self.waiting.pop(effect.request_id)
            elif isinstance(effect, BeginSwap):
                self.swap = (effect.expert, self.now_ms + SWAP_MS)
            elif isinstance(effect, Refuse):
                self.refused += 1
                del self.waiting[effect.request_id]


def percentile(samples: list[float], percent: int) -> float:
    return round(statistics.quantiles(samples, n=100)[percent - 1], 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=150)
    parser.add_argument("--queued", type=int, default=10_000)
    parser.add_argument("--decisions", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="FILE", help="write the result; '-' for standard output")
    options = parser.parse_args()
    load = Load(options.experts, options.queued, options.seed)
    load.fill()
    for _ in range(options.decisions):
        load.step()
    samples = [us for kind in load.took_us.values() for us in kind]
    result = {
        "benchmark": "scheduler",
        "experts": options.experts,
        "queued_at_start": options.queued,
        "queued_at_end": len(load.scheduler.queued_ids),
        "decisions": len(samples),
        "refused": load.refused,
        "seed": options.seed,
        "decision_p50_us": percentile(samples, 50),
        "decision_p99_us": percentile(samples, 99),
        "by_event_p50_us": {
            kind: percentile(us, 50) for kind, us in load.took_us.items() if len(us) > 1
        },
        "by_event_count": {kind: len(us) for kind, us in load.took_us.items()},
    }
    print(
        f"{options.experts} experts, {options.queued} waiting: a decision takes "
        f"{result['decision_p50_us']} us (p50), {result['decision_p99_us']} us (p99)",
        file=sys.stderr,
    )
    _report.write(result, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
