"""In-place swap on a GPU, without an engine: our copy against the link's limit, and exactness.

Needs torch and a CUDA device. Builds parameter sets of the shape of 1B, 7B and 13B Llama models on
the device, pools two experts in page-locked host memory, and swaps between them.

    python bench/gpu_swap.py [--json FILE] [--shapes 1B,7B,13B] [--swaps 10]

Key per shape: ``link_gib_s`` (one large page-locked copy), ``swap_ms`` and ``swap_over_link`` (our
pool: one allocation per expert, copies over streams), ``per_tensor_over_link`` (one allocation per
tensor, one stream), ``identical`` (every byte after each swap).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from bench import _report
from experts.weight_pool import TensorLayout, WeightPool

# layers, hidden, intermediate, key-value width, vocabulary
SHAPES = {
    "1B": (16, 2048, 8192, 512, 128_256),
    "7B": (32, 4096, 11_008, 4096, 32_000),
    "13B": (40, 5120, 13_824, 5120, 32_000),
}


def main() -> int:
    options = _options()
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 3
    result: dict[str, Any] = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__}
    for shape in options.shapes.split(","):
        result[shape] = _measure(shape, options.swaps)
        print(shape, result[shape], file=sys.stderr, flush=True)
    _report.write(result, options.json)
    return 0 if all(result[s]["identical"] for s in options.shapes.split(",")) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="result file; - for standard output")
    parser.add_argument("--shapes", default="1B,7B,13B")
    parser.add_argument("--swaps", type=int, default=10)
    return parser.parse_args()


def _measure(shape: str, swaps: int) -> dict[str, Any]:
    tensors = _parameters(*SHAPES[shape])
    layout = TensorLayout.of(tensors)
    pool = WeightPool(layout, limit_bytes=2 * layout.total_bytes, pin=True)
    sums = {}
    for expert, seed in (("a", 1), ("b", 2)):
        torch.manual_seed(seed)
        for tensor in tensors.values():
            tensor.normal_()
        pool.snapshot(expert, tensors, cost_s=1.0)
        sums[expert] = _checksum(tensors)
    swap_ms, identical = [], True
    for number in range(swaps):
        expert = "ab"[number % 2]
        swap_ms.append(_timed_ms(lambda name=expert: pool.copy_into(name, tensors)))
        identical &= _checksum(tensors) == sums[expert]
    link_ms = _link_ms(layout.payload_bytes, swaps)
    per_tensor_ms = _per_tensor_ms(tensors, swaps)
    for expert in ("a", "b"):
        pool.drop(expert)
    swap = statistics.median(swap_ms)
    return {
        "bytes": layout.payload_bytes,
        "tensors": len(layout.slots),
        "link_gib_s": round(layout.payload_bytes / 2**30 / (link_ms / 1e3), 1),
        "swap_ms": round(swap, 2),
        "swap_over_link": round(swap / link_ms, 3),
        "per_tensor_over_link": round(per_tensor_ms / link_ms, 3),
        "identical": identical,
    }


def _parameters(
    layers: int, hidden: int, inner: int, kv: int, vocabulary: int
) -> dict[str, torch.Tensor]:
    shapes = {"embed": (vocabulary, hidden), "head": (vocabulary, hidden), "norm": (hidden,)}
    for at in range(layers):
        shapes |= {
            f"{at}.qkv": (hidden + 2 * kv, hidden),
            f"{at}.out": (hidden, hidden),
            f"{at}.gate_up": (2 * inner, hidden),
            f"{at}.down": (hidden, inner),
            f"{at}.norm1": (hidden,),
            f"{at}.norm2": (hidden,),
        }
    return {
        name: torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        for name, shape in shapes.items()
    }


def _checksum(tensors: dict[str, torch.Tensor]) -> list[int]:
    """Exact: wrapping sums of the bits, weighted by position so that exchanges show."""
    sums = []
    for tensor in tensors.values():
        bits = tensor.view(torch.int16).flatten().to(torch.int64)
        weights = torch.arange(1, bits.numel() + 1, device=bits.device) % 65_521
        sums.append(int((bits * weights).sum().item()))
    return sums


def _timed_ms(work: Callable[[], Any]) -> float:
    """Host clock round work that ends with a synchronisation of its own."""
    import time

    torch.cuda.synchronize()
    started = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def _link_ms(size_bytes: int, repeats: int) -> float:
    """One large page-locked copy of as many bytes, in pieces of at most 1 GiB."""
    piece = min(size_bytes, 1 << 30)
    source = torch.empty(piece, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(piece, dtype=torch.uint8, device="cuda")
    times = [_timed_ms(lambda: target.copy_(source, non_blocking=True)) for _ in range(repeats)]
    return statistics.median(times) * size_bytes / piece


def _per_tensor_ms(tensors: dict[str, torch.Tensor], repeats: int) -> float:
    sources = {name: tensor.cpu().pin_memory() for name, tensor in tensors.items()}

    def copy() -> None:
        for name, tensor in tensors.items():
            tensor.copy_(sources[name], non_blocking=True)

    return statistics.median(_timed_ms(copy) for _ in range(repeats))


if __name__ == "__main__":
    sys.exit(main())
