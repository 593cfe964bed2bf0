"""In-place swap on a real engine: time against one plain copy and a cold start, and exactness.

Starts, one after the other: an engine with all experts in its pool; a fresh engine per expert (the
reference that swapped weights must equal token for token, and the cold start); and one engine as
vLLM ships it, to see what keeping plain weights costs or gains.

    python bench/swap.py [--json FILE] [--swaps 30] [--experts general,sql]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import _report

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Table users(id, name, age). Write SQL for the names of users older than 30.",
    "A box holds 12 eggs. How many eggs are in 7 boxes?",
)
TOKENS = 40


async def main() -> int:
    options = _options()
    folders = _folders(options.experts)
    say(f"experts: {', '.join(folders)}")
    swapped = await _swapping_engine(folders, options.swaps, options.seed)
    fresh: dict[str, list[list[int]]] = {}
    cold_s: list[float] = []
    for expert, folder in folders.items():
        answers, seconds = await _fresh_engine(expert, folder)
        fresh[expert] = answers
        cold_s.append(seconds)
    stock_expert = list(folders)[-1]
    stock, stock_tokens_per_s = await _stock_engine(folders[stock_expert])
    result = _summary(swapped, fresh, cold_s)
    result["token_identical_to_packed_kernels"] = stock == fresh[stock_expert]
    result["tokens_per_s_over_packed_kernels"] = round(
        swapped["tokens_per_s"] / stock_tokens_per_s, 2
    )
    _print(result)
    _report.write(result, options.json)
    return 0 if result["token_identical"] else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="result file; - for standard output")
    parser.add_argument("--swaps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--experts", default="", help="comma-separated; default: all prepared")
    return parser.parse_args()


def _folders(wanted: str) -> dict[str, str]:
    """The quickstart's prepared models."""
    import os

    from experts.catalogue import cache_dir

    root = cache_dir(os.environ) / "quickstart"
    names = (
        wanted.split(",")
        if wanted
        else sorted(
            (p.parent.name for p in root.glob("*/config.json")), key=lambda n: (n != "general", n)
        )
    )
    if len(names) < 2:
        sys.exit("at least two prepared experts are needed: run `make models`")
    return {name: str(root / name) for name in names}


async def _swapping_engine(folders: dict[str, str], swaps: int, seed: int) -> dict[str, Any]:
    from experts.vllm_engine import EngineSettings, SwappableEngine

    engine, refused = await SwappableEngine.start(folders, EngineSettings(), progress=say)
    if refused:
        sys.exit(f"could not be pooled: {refused}")
    try:
        return await _measure_swaps(engine, list(folders), swaps, random.Random(seed))
    finally:
        engine.shutdown()


async def _measure_swaps(
    engine: Any, experts: list[str], swaps: int, rng: random.Random
) -> dict[str, Any]:
    """A random sequence of swaps; after each, the resident expert answers one of the prompts."""
    reports, answers = [], {expert: {} for expert in experts}
    tokens, generating_s = 0, 0.0
    order = experts + [rng.choice(experts) for _ in range(max(0, swaps - len(experts)))]
    for number, expert in enumerate(order):
        reports.append(await engine.make_resident(expert))
        which = number % len(PROMPTS)
        started = time.perf_counter()
        answer = await _greedy(engine.engine, PROMPTS[which])
        generating_s += time.perf_counter() - started
        tokens += len(answer)
        answers[expert].setdefault(which, []).append(answer)
    # Every expert answers every prompt at least once, in an order nothing was tuned for.
    for expert in rng.sample(experts, len(experts)):
        reports.append(await engine.make_resident(expert))
        for which, prompt in enumerate(PROMPTS):
            answers[expert].setdefault(which, []).append(await _greedy(engine.engine, prompt))
    copies = await engine.plain_copy_ms(max(10, swaps))
    return {
        "reports": reports,
        "answers": answers,
        "copies_ms": copies,
        "tokens_per_s": tokens / generating_s,
    }


async def _fresh_engine(
    expert: str, folder: str, settings: Any = None
) -> tuple[list[list[int]], float]:
    from experts.vllm_engine import EngineSettings, SwappableEngine

    say(f"fresh engine with {expert}")
    started = time.perf_counter()
    engine, _ = await SwappableEngine.start(
        {expert: folder}, settings or EngineSettings(), progress=quiet
    )
    seconds = time.perf_counter() - started
    try:
        return [await _greedy(engine.engine, prompt) for prompt in PROMPTS], seconds
    finally:
        engine.shutdown()


async def _stock_engine(folder: str) -> tuple[list[list[int]], float]:
    """vLLM without our worker extension: weights packed by oneDNN on CPU."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from experts.vllm_engine import EngineSettings, _pick_dtype

    say("engine as vLLM ships it")
    settings = EngineSettings()
    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=folder,
            dtype=_pick_dtype("auto"),
            max_model_len=settings.max_model_len,
            kv_cache_memory_bytes=settings.kv_cache_bytes,
            max_num_seqs=settings.max_num_seqs,
            enforce_eager=True,
            generation_config="vllm",
            disable_log_stats=True,
        )
    )
    try:
        await _greedy(engine, PROMPTS[0])
        started = time.perf_counter()
        answers = [await _greedy(engine, prompt) for prompt in PROMPTS]
        seconds = time.perf_counter() - started
        return answers, sum(map(len, answers)) / seconds
    finally:
        engine.shutdown()


async def _greedy(engine: Any, prompt: str) -> list[int]:
    """Token ids of a greedy answer of TOKENS tokens, computed without cached blocks.

    Past the end of the answer too: a specialist that stops at once would be compared on nothing.
    """
    import uuid

    from vllm import SamplingParams
    from vllm.inputs.engine import tokens_input

    ids = engine.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    final = None
    salt = uuid.uuid4().hex
    async for output in engine.generate(tokens_input(ids, cache_salt=salt), params, salt):
        final = output
    assert final is not None
    return list(final.outputs[0].token_ids)


def _summary(
    swapped: dict[str, Any], fresh: dict[str, list[list[int]]], cold_s: Sequence[float]
) -> dict[str, Any]:
    reports = swapped["reports"]
    swap_ms = statistics.median(r.swap_ms for r in reports)
    copy_ms = statistics.median(swapped["copies_ms"])
    cold_ms = statistics.median(cold_s) * 1e3
    compared = [
        answer == fresh[expert][which]
        for expert, by_prompt in swapped["answers"].items()
        for which, answers in by_prompt.items()
        for answer in answers
    ]
    distinct = len({tuple(map(tuple, answers)) for answers in fresh.values()})
    return {
        "experts": len(fresh),
        "swaps": len(reports),
        "bytes": reports[0].bytes,
        "swap_ms": round(swap_ms, 2),
        "swap_ms_max": round(max(r.swap_ms for r in reports), 2),
        "plain_copy_ms": round(copy_ms, 2),
        "cold_start_ms": round(cold_ms),
        "swap_over_copy": round(swap_ms / copy_ms, 2),
        "cold_over_swap": round(cold_ms / swap_ms),
        "canary_ms": round(statistics.median(r.canary_ms for r in reports), 1),
        "answers_compared": len(compared),
        "answers_identical": sum(compared),
        "experts_answering_differently": distinct,
        "token_identical": all(compared),
        "tokens_per_s": round(swapped["tokens_per_s"], 1),
    }


def _print(result: dict[str, Any]) -> None:
    for key, value in result.items():
        print(f"{key:36} {value}", file=sys.stderr)


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def quiet(_text: str) -> None:
    return


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
