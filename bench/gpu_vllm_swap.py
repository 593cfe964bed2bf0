"""In-place swap in a real vLLM engine on a GPU: against the link, sleep mode and cold start.

Needs a CUDA device, vLLM and two models of one architecture, as folders or hub ids. Starts, one
after the other: an engine with both models in its pool, swapped ``--swaps`` times at random; a
fresh engine with each (the cold start, and the answers that swapped weights must equal token for
token); and two engines beside each other that take turns by vLLM sleep mode, level 1.

    python bench/gpu_vllm_swap.py --models A,B [--json FILE] [--swaps 20] [--kv-gib 4]

Keys: ``swap_ms`` (whole call, without canary), ``link_share`` (one plain page-locked copy of the
same bytes over the swap), ``sleep_turn_ms`` (one engine asleep and the other awake),
``cold_start_ms``, ``sleep_over_swap``, ``cold_over_swap``, ``token_identical``.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import _report
from bench.swap import PROMPTS, _fresh_engine, _greedy, _measure_swaps, quiet, say


async def main() -> int:
    options = _options()
    import torch

    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 3
    from experts.compat import check_compatible, resolve_model_folder
    from experts.vllm_engine import EngineSettings

    folders = {name: str(resolve_model_folder(name)) for name in options.models.split(",")}
    first, second = folders
    check_compatible(folders[first], folders[second], expert=second)
    settings = EngineSettings(
        kv_cache_bytes=options.kv_gib << 30, pool_bytes=options.pool_gib << 30
    )
    swapped = await _swapped(folders, settings, options.swaps, random.Random(options.seed))
    fresh, cold_s = {}, []
    for name, folder in folders.items():
        fresh[name], seconds = await _fresh_engine(name, folder, settings)
        cold_s.append(seconds)
    turns_s = await _sleep_turns(folders, settings, max(4, options.swaps // 4))
    result = summary(swapped, fresh, cold_s, turns_s)
    result |= {"gpu": torch.cuda.get_device_name(0), "models": list(folders)}
    _report.write(result, options.json)
    return 0 if result["token_identical"] else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", required=True, help="two of one architecture, comma-separated")
    parser.add_argument("--json", help="result file; - for standard output")
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--kv-gib", type=int, default=4)
    parser.add_argument("--pool-gib", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.models.count(",") != 1:
        parser.error("--models needs two models, separated by a comma")
    return options


async def _swapped(
    folders: Mapping[str, str], settings: Any, swaps: int, rng: random.Random
) -> dict[str, Any]:
    from experts.vllm_engine import SwappableEngine

    say("one engine, both models in its pool")
    engine, refused = await SwappableEngine.start(folders, settings, progress=say)
    try:
        if refused:
            sys.exit(f"could not be pooled: {refused}")
        return await _measure_swaps(engine, list(folders), swaps, rng)
    finally:
        engine.shutdown()


async def _sleep_turns(folders: Mapping[str, str], settings: Any, turns: int) -> list[float]:
    """Seconds of each turn: one engine falls asleep, the other wakes and answers its canary."""
    from experts.device_memory import start_utilization
    from experts.vllm_engine import SwappableEngine

    say("two engines that take turns asleep")
    engines: list[Any] = []
    try:
        for name, folder in folders.items():
            share = None
            if engines:
                await engines[-1].sleep()
                share = start_utilization(await engines[-1].device_memory())
            own = replace(settings, sleeps=True, device_share=share)
            engines.append((await SwappableEngine.start({name: folder}, own, progress=quiet))[0])
        await engines[1].sleep()  # the first sleep pays for pinning and is no turn
        await engines[0].wake()
        seconds = []
        for turn in range(turns):
            leaving, coming = engines[turn % 2], engines[(turn + 1) % 2]
            started = time.perf_counter()
            await leaving.sleep()
            await coming.wake()
            seconds.append(time.perf_counter() - started)
            await coming.prove(coming.resident)
            await _greedy(coming.engine, PROMPTS[0])
        return seconds
    finally:
        for engine in engines:
            engine.shutdown()


def summary(
    swapped: Mapping[str, Any],
    fresh: Mapping[str, list[list[int]]],
    cold_s: Sequence[float],
    turns_s: Sequence[float],
) -> dict[str, Any]:
    """``swapped``: what ``bench.swap._measure_swaps`` returns. Swaps from disk are left out."""
    reports = [r for r in swapped["reports"] if r.source == "pool"]
    swap_ms = statistics.median(r.swap_ms for r in reports)
    link_ms = statistics.median(swapped["copies_ms"])
    cold_ms, turn_ms = statistics.median(cold_s) * 1e3, statistics.median(turns_s) * 1e3
    same = [
        answer == fresh[name][which]
        for name, by_prompt in swapped["answers"].items()
        for which, answers in by_prompt.items()
        for answer in answers
    ]
    return {
        "bytes": reports[0].bytes,
        "swaps": len(reports),
        "swap_ms": round(swap_ms, 2),
        "copy_ms": round(statistics.median(r.copy_ms for r in reports), 2),
        "plain_copy_ms": round(link_ms, 2),
        "link_gib_s": round(reports[0].bytes / 2**30 / (link_ms / 1e3), 1),
        "link_share": round(link_ms / swap_ms, 3),
        "canary_ms": round(statistics.median(r.canary_ms for r in reports), 1),
        "sleep_turn_ms": round(turn_ms, 1),
        "cold_start_ms": round(cold_ms),
        "sleep_over_swap": round(turn_ms / swap_ms, 1),
        "cold_over_swap": round(cold_ms / swap_ms, 1),
        "answers_compared": len(same),
        "token_identical": bool(same) and all(same),
    }


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
