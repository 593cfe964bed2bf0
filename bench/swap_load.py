"""Load on a real engine: our scheduler against FCFS with LRU, over a sweep of loads.

One vLLM engine, five experts in its pool, one slot. The load is bursty and skewed: each expert's
requests come in bursts of their own (gamma gaps, coefficient of variation 3), Zipf-distributed over
experts; answers are short. At each load the same arrivals are played to all schedulers, over the
same driver, engine, copies and canary, each scheduler twice, there and back (ours, FCFS, FCFS in
batches, FCFS in batches, FCFS, ours), so that a machine that slows down or speeds up favours none.

``fcfs_lru`` is strict order; ``fcfs_lru_batched`` takes as many requests as the engine runs at once
(16) in order of arrival and serves them grouped by expert, resident first (``_fcfs_lru``).

    python bench/swap_load.py [--json FILE] [--loads 0.5,0.65,0.8,0.95,1.1] [--turns 20]

**Loads** are shares of what the machine serves when it turns to another expert for every full
batch: the median of 15 such turns, each with its swap and canary, measured before the sweep. They
are measured again after it; ``turn_drift`` is what they take then over what they took before. A
round's arrivals last ``--turns`` of them, and the objective for the first token is, unless given,
four; callers leave after five times that. Our age bound is six turns, as it should be on any
hardware (docs/adr/0010); on a machine whose turn takes half a second that is the default of 3 s.
So a slower machine plays the same experiment, slower.

**Keys.** ``goodput_ratio`` (requests whose first token came within the objective, ours over
``fcfs_lru``) and ``p99_wait_ratio`` (p99 of the wait for the first token; who got none waited
``patience_ms``) are those at the main load, which a rule fixes before anything runs: the highest
load of the sweep up to which OURS serves at least 90 % of the requests in time. It is where one who
runs our scheduler has to stop adding load, and the baselines have no say in it. That favours ours
in so far as a baseline may have its best point elsewhere; so every point is reported, and
``sustained_ratio`` holds each at its own: the highest rate at which 90 % of the requests meet the
objective (DistServe's goodput), ours over ``fcfs_lru``, interpolated between the loads of the
sweep. ``against_batched`` holds the same three against ``fcfs_lru_batched``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import _report
from bench._fcfs_lru import FcfsLru
from bench._load_sweep import (
    Arrival,
    Outcome,
    Terms,
    arrivals,
    main_load,
    ratios,
    sustained_rate,
    sustained_ratio,
)
from bench.swap import quiet, say
from deployments.host import EngineActuator
from deployments.swap.config import SchedulerConfig
from deployments.swap.core import Scheduler
from deployments.swap.driver import SlotDriver, SlotScheduler
from experts.errors import CoeError
from experts.types import Endpoint

EXPERTS = 5
TOKENS = 8
LOADS = "0.5,0.65,0.8,0.95,1.1"
OBJECTIVE_TURNS, AGE_BOUND_TURNS = 4, 6
CALIBRATION_ROUNDS = 3
# The defaults that a host has, but that nothing except the callers' patience ends a wait under any
# of the schedulers. The age bound follows the turn.
CONFIG = SchedulerConfig(queue_wait_ms_max=600_000.0)
OURS, STRICT, BATCHED = "ours", "fcfs_lru", "fcfs_lru_batched"
SCHEDULERS = (OURS, STRICT, BATCHED)


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
    say(
        f"at {result['main_requests_per_s']} requests/s goodput_ratio {result['goodput_ratio']}, "
        f"p99_wait_ratio {result['p99_wait_ratio']}; sustained {result['sustained_ratio']}"
    )
    _report.write(result, options.json)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="result file; - for standard output")
    parser.add_argument("--loads", type=_shares, default=LOADS, help="shares of turning capacity")
    parser.add_argument("--turns", type=float, default=20.0, help="that a round's arrivals last")
    parser.add_argument("--objective-ms", type=float, help="time to first token")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


def _shares(text: str) -> list[float]:
    shares = sorted(float(word) for word in text.split(","))
    if shares[0] <= 0:
        raise ValueError("a load is above 0")
    return shares


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
    busy_before = os.getloadavg()[0]
    await _turns(engine, experts, 1)  # warm
    turns = await _turns(engine, experts, CALIBRATION_ROUNDS)
    turn_s = statistics.median(turns)
    capacity = CONFIG.in_flight_max / turn_s
    turn_ms = turn_s * 1e3
    terms = Terms(options.objective_ms or OBJECTIVE_TURNS * turn_ms, AGE_BOUND_TURNS * turn_ms)
    say(f"a turn takes {turn_s:.2f} s: {capacity:.1f} requests/s turning at every full batch")
    points = [
        {
            "load": share,
            **await _compare(
                engine, experts, share * capacity, options.turns * turn_s, terms, options.seed
            ),
        }
        for share in options.loads
    ]
    after_s = statistics.median(await _turns(engine, experts, 1))
    return {
        "experts": len(experts),
        "tokens_per_answer": TOKENS,
        "objective_ms": round(terms.objective_ms, 1),
        "patience_ms": round(terms.patience_ms, 1),
        "age_bound_ms": round(terms.age_bound_ms, 1),
        "turn_ms": [round(q * 1e3, 1) for q in statistics.quantiles(turns, n=4)],
        "turn_drift": round(after_s / turn_s, 2),
        "seconds_per_round": round(options.turns * turn_s, 1),
        "turning_capacity_per_s": round(capacity, 1),
        "machine_load_before": round(busy_before, 2),
        "seed": options.seed,
        **reading(points),
        "points": points,
    }


def reading(points: list[dict[str, Any]]) -> dict[str, Any]:
    """The keys that the module's docstring names."""
    main_point = main_load(points, OURS)
    sustained = {name: sustained_rate(points, name) for name in SCHEDULERS}
    return {
        "main_load": main_point["load"],
        "main_requests_per_s": main_point["requests_per_s"],
        **ratios(main_point[OURS], main_point[STRICT]),
        "sustained": sustained,
        "sustained_ratio": sustained_ratio(sustained[OURS], sustained[STRICT]),
        "against_batched": {
            **ratios(main_point[OURS], main_point[BATCHED]),
            "sustained_ratio": sustained_ratio(sustained[OURS], sustained[BATCHED]),
        },
    }


async def _turns(engine: Any, experts: list[str], rounds: int) -> list[float]:
    """Seconds of each turn: a swap with its canary, and a full batch of the expert's requests."""
    turns = []
    for number in range(rounds):
        for expert in experts:
            began = time.perf_counter()
            await engine.make_resident(expert)
            prompts = [f"{began:.6f} {number} plus {n} is" for n in range(CONFIG.in_flight_max)]
            await asyncio.gather(
                *(_first_token_and_rest(engine, expert, prompt, lambda: True) for prompt in prompts)
            )
            turns.append(time.perf_counter() - began)
    return turns


async def _compare(
    engine: Any, experts: list[str], rate: float, seconds: float, terms: Terms, seed: int
) -> dict[str, Any]:
    """All schedulers on the same arrivals, there and back."""
    outcomes = {name: Outcome() for name in SCHEDULERS}
    for at, name in enumerate((*SCHEDULERS, *reversed(SCHEDULERS))):
        load = arrivals(experts, rate, seconds, seed + at // len(SCHEDULERS))
        outcomes[name].add(await _play(engine, experts, load, terms, name))
    summaries = {name: outcome.summary(terms) for name, outcome in outcomes.items()}
    for name, summary in summaries.items():
        say(
            f"{rate:5.1f}/s {name:17} in time {summary['goodput']:6.1%} of {summary['requests']}, "
            f"p99 {summary['wait_ms']['p99'] / 1e3:.2f} s, {summary['swaps']} swaps"
        )
    return {"requests_per_s": round(rate, 2), **summaries}


def _scheduler(
    name: str, experts: list[str], resident: str | None, age_bound_ms: float
) -> SlotScheduler:
    if name == OURS:
        return Scheduler(replace(CONFIG, age_bound_ms=age_bound_ms), experts, resident)
    batch_max = CONFIG.in_flight_max if name == BATCHED else 1
    return FcfsLru(CONFIG, resident, batch_max=batch_max)


async def _play(
    engine: Any, experts: list[str], load: list[Arrival], terms: Terms, name: str
) -> Outcome:
    """One round; ends when the last request has, so that the next begins with an idle engine."""
    actuator = _Counting(EngineActuator(engine))
    driver = SlotDriver(
        CONFIG,
        experts,
        actuator,
        clock=lambda: time.monotonic() * 1e3,
        scheduler=_scheduler(name, experts, engine.resident, terms.age_bound_ms),
    )
    await driver.start()
    outcome = Outcome()
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for number, arrival in enumerate(load):
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
