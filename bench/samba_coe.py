"""Samba-CoE's setting beside ours: switching and footprint, by arithmetic from cluster files.

The left column is what arXiv 2405.07518 publishes; the others follow from a described cluster
(``deployments/simulate/*.yaml``): how long one expert takes over a link, or split over all of them,
how many experts host memory holds, and how many such nodes would hold every expert on a device.

    python bench/samba_coe.py [--cluster h100_node] [--experts 150] [--json FILE]
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import _report
from deployments.simulate.cluster import Cluster, load_cluster, shipped_cluster

PUBLISHED = {
    "experts": "150 of Llama-2-7B size, over 1 T parameters",
    "link": "over 1 TB/s per node; baselines 32 (A100) and 64 GB/s (H100)",
    "copy_ms": "13.5; baselines 421 and 211 (arithmetic)",
    "copy_split_ms": "is so already: experts run tensor-parallel over 8",
    "switching_ratio": "15-31 times faster than the DGX baselines",
    "in_host_memory": "150 in 1.5 TiB of DDR",
    "footprint_ratio": "up to 19",
}
BASELINE_GB_PER_S = 64.0  # what the paper grants a DGX H100


def figures(cluster: Cluster, experts: int) -> dict[str, Any]:
    """The same quantities for a cluster. Times in ms, without the fixed part of a swap."""
    device = cluster.accelerators
    on_device = int((device.device_bytes - device.kv_reserve_bytes) // cluster.experts.bytes)
    nodes = math.ceil(experts / max(1, on_device * device.count))
    copy_ms = cluster.copy_ms
    return {
        "experts": f"{experts} x {cluster.experts.bytes / 1e9:.2f} GB",
        "link": f"{cluster.link.gigabytes_per_s} GB/s x {cluster.link.efficiency} per accelerator",
        "copy_ms": round(copy_ms, 1),
        "swap_ms": round(copy_ms + cluster.link.swap_fixed_ms, 1),
        "copy_split_ms": round(copy_ms / device.count, 1),
        "switching_ratio": round(
            1e3 * cluster.experts.bytes / BASELINE_GB_PER_S / 1e9 / copy_ms, 2
        ),
        "switching_ratio_split": round(
            1e3 * cluster.experts.bytes / BASELINE_GB_PER_S / 1e9 / (copy_ms / device.count), 2
        ),
        "in_host_memory": cluster.pooled_max,
        "nodes_to_hold_all_on_devices": nodes,
        "footprint_ratio": nodes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cluster", default="h100_node", help="a cluster file or a shipped name")
    parser.add_argument("--experts", type=int, default=150)
    parser.add_argument("--json", metavar="FILE", help="write the result; '-' for standard output")
    options = parser.parse_args()
    path = Path(options.cluster)
    cluster = load_cluster(path if path.suffix else shipped_cluster(options.cluster))
    ours = figures(cluster, options.experts)
    print("| | Samba-CoE, published | here |\n|---|---|---|", file=sys.stderr)
    for key, value in ours.items():
        print(f"| {key} | {PUBLISHED.get(key, '-')} | {value} |", file=sys.stderr)
    _report.write(
        {
            "benchmark": "samba_coe",
            "cluster": options.cluster,
            "published": PUBLISHED,
            "here": ours,
        },
        options.json,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
