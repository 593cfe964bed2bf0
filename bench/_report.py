"""What every benchmark shares: which machine, which day, and where the JSON goes."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Processor, cores and memory, as a reader needs them to judge a figure."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(result: dict[str, Any], target: str | None) -> None:
    """Add date and machine; write JSON to ``target`` ("-": standard output), and say so."""
    full = {
        **result,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
    }
    text = json.dumps(full, indent=2, sort_keys=True)
    if target == "-":
        print(text)
    elif target:
        Path(target).write_text(text + "\n")
        print(f"wrote {target}", file=sys.stderr)
