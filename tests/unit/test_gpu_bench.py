"""The arithmetic of the GPU benchmark that no machine without a GPU can run as a whole."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from bench.gpu_vllm_swap import summary
from experts.vllm_engine import SwapReport

REPORT = SwapReport("a", "pool", 2 << 30, copy_ms=90.0, swap_ms=100.0, canary_ms=20.0)
SWAPPED = {
    "reports": [REPORT, replace(REPORT, source="disk", swap_ms=9_000.0), REPORT],
    "answers": {"a": {0: [[1, 2], [1, 2]]}, "b": {0: [[3]]}},
    "copies_ms": [80.0, 80.0, 200.0],
}
FRESH = {"a": [[1, 2]], "b": [[3]]}


def test_ratios_are_against_the_swap_from_the_pool() -> None:
    result = summary(SWAPPED, FRESH, [20.0, 30.0], [0.4, 0.6])
    assert result["swap_ms"] == 100.0
    assert result["link_share"] == 0.8
    assert result["link_gib_s"] == 25.0
    assert (result["sleep_over_swap"], result["cold_over_swap"]) == (5.0, 250.0)
    assert result["token_identical"] is True


def test_one_wrong_token_shows() -> None:
    assert summary(SWAPPED, {**FRESH, "b": [[4]]}, [1], [1])["token_identical"] is False
    assert summary({**SWAPPED, "answers": {}}, FRESH, [1], [1])["token_identical"] is False


@pytest.mark.parametrize("arguments", [["--models", "a"], []])
def test_it_asks_for_two_models(arguments: list[str]) -> None:
    ran = subprocess.run(
        [sys.executable, "bench/gpu_vllm_swap.py", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 2
    assert "--models" in ran.stderr
