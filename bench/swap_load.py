"""Load on a real engine: our scheduler against FCFS with LRU, on one arrival trace.

One vLLM engine, five experts in its pool, one slot. The load is bursty and skewed: each expert's
requests come in bursts of their own (gamma gaps, coefficient of variation 3), Zipf-distributed over
experts; answers are short. The same trace is played to both schedulers, twice, in the order ours,
baseline, baseline, ours, over the same driver, engine, copies and canary.

The rate is a share (``--load``) of what this machine can serve in full batches of one expert after
another, measured first; a second, lighter load follows, to show where the gain ends. Under a load
that either order could serve, neither has to choose, and the ratios go to 1.

    python bench/swap_load.py [--json FILE] [--seconds 24] [--load 0.7] [--objective-ms MS]

The objective for the first token is, unless given, what four full batches with their swaps take on
this machine, and callers leave after six times that: both would mean nothing on a faster one.

Keys: ``goodput_ratio`` (requests whose first token came within the objective, ours over baseline)
and ``p99_wait_ratio`` (p99 of the wait for the first token, ours over baseline; who got none waited
``patience_ms``), at the main load; ``ours``, ``fcfs_lru`` and ``light`` hold the figures.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import _report
from bench._fcfs_lru import FcfsLru
from bench.swap import quiet, say
from deployments.host import EngineActuator
from deployments.swap.config import SchedulerConfig
from deployments.swap.core import Scheduler
from deployments.swap.driver import SlotDriver, SlotScheduler
from experts.errors import CoeError
from experts.types import Endpoint

EXPERTS = 5
TOKENS = 8
BURSTINESS = 3.0  # coefficient of variation of the gaps between one expert's requests
LIGHT_SHARE = 0.25  # of the main load
OBJECTIVE_BATCHES = 4
PATIENCE_OBJECTIVES = 6
CONFIG = SchedulerConfig()  # the defaults that a host has


@dataclass(frozen=True, slots=True)
class Terms:
    """What callers want: the first token within the objective; they leave when patience ends."""

    objective_ms: float

    @property
    def patience_ms(self) -> float:
        return PATIENCE_OBJECTIVES * self.objective_ms


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    expert: str
    prompt: str


@dataclass(slots=True)
class Outcome:
    """Milliseconds from arrival to the first token, of served requests; refusals by class."""

    waits_ms: list[float] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)
    swaps: int = 0

    def add(self, other: Outcome) -> None:
        self.waits_ms += other.waits_ms
        self.swaps += other.swaps
        for name, count in other.refused.items():
            self.refused[name] = self.refused.get(name, 0) + count

    def summary(self, terms: Terms) -> dict[str, Any]:
        missed = sum(self.refused.values())
        waits = sorted(self.waits_ms + [terms.patience_ms] * missed)
        within = sum(wait <= terms.objective_ms for wait in self.waits_ms)
        return {
            "requests": len(waits),
            "within_objective": within,
            "goodput": round(within / len(waits), 4),
            "refused": self.refused,
            "swaps": self.swaps,
            "wait_ms": {
                name: round(waits[min(len(waits) - 1, int(share * len(waits)))], 1)
                for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
            },
        }


async def main() -> int:
    options = _options()
    started = time.perf_counter()
    with _five_experts() as folders:
        from experts.engine_group import EngineGroup
        from experts.vllm_engine import EngineSettings

        engine, refused = await EngineGroup.start(
            folders, EngineSettings(), engines_max=1, progress=quiet
        )
        try:
            if refused:
                sys.exit(f"could not be pooled: {refused}")
            result = await _measure(engine, list(folders), options)
        finally:
            engine.shutdown()
    result["runtime_s"] = round(time.perf_counter() - started, 1)
    say(f"goodput_ratio {result['goodput_ratio']}, p99_wait_ratio {result['p99_wait_ratio']}")
    _report.write(result, options.json)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="result file; - for standard output")
    parser.add_argument("--seconds", type=float, default=24.0, help="of arrivals in each round")
    parser.add_argument("--load", type=float, default=0.7, help="share of batched capacity")
    parser.add_argument("--objective-ms", type=float, help="time to first token")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


@contextlib.contextmanager
def _five_experts() -> Iterator[dict[str, str]]:
    """The quickstart's prepared models, and means of two of them until there are five."""
    from bench.swap import _folders

    folders = dict(list(_folders("").items())[:EXPERTS])
    with tempfile.TemporaryDirectory(prefix="coe-swap-load-") as scratch:
        while len(folders) < EXPERTS:
            parents = list(folders.values())[-2:]
            name = f"blend{len(folders)}"
            folders[name] = str(_blend(parents[0], parents[1], Path(scratch) / name))
        yield folders


def _blend(first: str, second: str, target: Path) -> Path:
    """An expert of its own: the mean of two experts' weights."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(first, target)
    a, b = (load_file(Path(folder) / "model.safetensors") for folder in (first, second))
    save_file(
        {name: a[name].lerp(b[name], 0.5).contiguous() for name in a},
        target / "model.safetensors",
        metadata={"format": "pt"},
    )
    return target


async def _measure(engine: Any, experts: list[str], options: argparse.Namespace) -> dict[str, Any]:
    batch_s, swap_s = await _calibrate(engine, experts)
    capacity = CONFIG.in_flight_max / (batch_s + swap_s)
    say(f"a full batch takes {batch_s:.2f} s, a swap with its canary {swap_s * 1e3:.0f} ms")
    terms = Terms(options.objective_ms or OBJECTIVE_BATCHES * (batch_s + swap_s) * 1e3)
    result: dict[str, Any] = {
        "experts": len(experts),
        "tokens_per_answer": TOKENS,
        "objective_ms": round(terms.objective_ms, 1),
        "patience_ms": round(terms.patience_ms, 1),
        "batch_ms": round(batch_s * 1e3, 1),
        "swap_and_canary_ms": round(swap_s * 1e3, 1),
        "batched_capacity_per_s": round(capacity, 1),
    }
    rate = options.load * capacity
    result |= await _compare(engine, experts, rate, options.seconds, terms, options.seed)
    result["light"] = await _compare(
        engine, experts, LIGHT_SHARE * rate, options.seconds / 2, terms, options.seed
    )
    return result


async def _calibrate(engine: Any, experts: list[str]) -> tuple[float, float]:
    """Median seconds of a full batch of one expert, and of a swap with its canary."""
    batches, swaps = [], []
    for number, expert in enumerate(experts * 2):
        started = time.perf_counter()
        await engine.make_resident(expert)
        swapped = time.perf_counter()
        await asyncio.gather(
            *(
                _first_token_and_rest(engine, expert, f"warm {number} {n}", lambda: True)
                for n in range(CONFIG.in_flight_max)
            )
        )
        swaps.append(swapped - started)
        batches.append(time.perf_counter() - swapped)
    return statistics.median(batches[len(experts) :]), statistics.median(swaps)


async def _compare(
    engine: Any, experts: list[str], rate: float, seconds: float, terms: Terms, seed: int
) -> dict[str, Any]:
    """Both schedulers on the same arrivals: ours, baseline, baseline, ours."""
    ours, baseline = Outcome(), Outcome()
    for at, outcome in enumerate((ours, baseline, baseline, ours)):
        name = "ours" if outcome is ours else "FCFS+LRU"
        say(f"{rate:.1f} requests/s for {seconds:.0f} s: {name}")
        arrivals = _arrivals(experts, rate, seconds, random.Random(seed + at // 2))
        outcome.add(await _play(engine, experts, arrivals, terms, ours=outcome is ours))
    mine, theirs = (o.summary(terms) for o in (ours, baseline))
    say(f"ours {mine}")
    say(f"FCFS+LRU {theirs}")
    return {
        "requests_per_s": round(rate, 1),
        "ours": mine,
        "fcfs_lru": theirs,
        "goodput_ratio": round(mine["within_objective"] / max(1, theirs["within_objective"]), 2),
        "p99_wait_ratio": round(mine["wait_ms"]["p99"] / theirs["wait_ms"]["p99"], 3),
    }


def _arrivals(experts: list[str], rate: float, seconds: float, rng: random.Random) -> list[Arrival]:
    """Each expert a gamma renewal process of its Zipf share, started long before the window."""
    weights = [1 / (rank + 1) for rank in range(len(experts))]
    shape = 1 / BURSTINESS**2
    found: list[Arrival] = []
    for expert, weight in zip(experts, weights, strict=True):
        mean_gap_s = sum(weights) / weight / rate
        at_s = -20 * mean_gap_s
        while at_s < seconds:
            if at_s >= 0:
                question = f"{rng.randrange(10**9)} plus {rng.randrange(10**9)} is"
                found.append(Arrival(at_s, expert, question))
            at_s += rng.gammavariate(shape, mean_gap_s / shape)
    return sorted(found, key=lambda arrival: arrival.at_s)


async def _play(
    engine: Any, experts: list[str], arrivals: list[Arrival], terms: Terms, *, ours: bool
) -> Outcome:
    """One round; ends when the last request has, so that the next begins with an idle engine."""
    scheduler: SlotScheduler = (
        Scheduler(CONFIG, experts, engine.resident) if ours else FcfsLru(CONFIG, engine.resident)
    )
    actuator = _Counting(EngineActuator(engine))
    driver = SlotDriver(
        CONFIG,
        experts,
        actuator,
        clock=lambda: time.monotonic() * 1e3,
        scheduler=scheduler,
    )
    await driver.start()
    outcome = Outcome()
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number, arrival in enumerate(arrivals):
            await asyncio.sleep(max(0.0, began + arrival.at_s - time.monotonic()))
            group.create_task(_request(engine, driver, arrival, f"r{number}", terms, outcome))
    await driver.aclose()
    outcome.swaps = actuator.swaps
    return outcome


class _Counting:
    def __init__(self, inner: EngineActuator) -> None:
        self._inner = inner
        self.swaps = 0

    async def make_resident(self, expert: str) -> Any:
        self.swaps += 1
        return await self._inner.make_resident(expert)


async def _request(
    engine: Any, driver: SlotDriver, arrival: Arrival, name: str, terms: Terms, outcome: Outcome
) -> None:
    came = time.monotonic()
    try:
        async with driver.lease(
            arrival.expert, request_id=name, queue_deadline_ms=terms.patience_ms
        ) as lease:
            while True:
                first_s = await _first_token_and_rest(
                    engine, arrival.expert, arrival.prompt, lease.first_token
                )
                if first_s is not None:
                    break
                await lease.requeue()
    except CoeError as error:
        kind = type(error).__name__
        outcome.refused[kind] = outcome.refused.get(kind, 0) + 1
    else:
        outcome.waits_ms.append((first_s - came) * 1e3)


async def _first_token_and_rest(
    engine: Any, expert: str, prompt: str, may_send: Callable[[], bool]
) -> float | None:
    """When the first token of a whole streamed answer came; None when it was taken back before."""
    body = {
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    events = await engine.serve(expert, Endpoint.COMPLETIONS, body, request_id="load")
    first_s: float | None = None
    async with contextlib.aclosing(events):
        async for _ in events:
            if first_s is None:
                first_s = time.monotonic()
                if not may_send():
                    return None
    return first_s


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
