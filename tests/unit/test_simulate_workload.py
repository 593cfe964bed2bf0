"""Traces become arrivals: counts, times, experts, tokens, and what a bad file gets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from deployments.simulate.trace_file import read_trace
from deployments.simulate.workload import (
    RateTrace,
    RequestTrace,
    TokenShape,
    from_rates,
    from_requests,
    window_times_s,
)
from experts.errors import ConfigError

RATES = RateTrace(
    600.0,
    rate_rps=np.array([[0.5, 0.0], [2.0, 1.0], [0.0, 4.0]]),
    cv=np.array([[1.0, 0.0], [3.0, 1.0], [0.0, 200.0]]),
)


def test_recorded_counts_are_kept_window_by_window() -> None:
    load = from_rates(RATES, experts=3, horizon_s=1200, rate_scale=1.0, seed=1)
    first = [a for a in load.arrivals if a.arrived_ms < 600_000]
    assert load.requests_of() == {"expert-002": 2400, "expert-001": 1800, "expert-000": 300}
    assert sum(a.expert == "expert-001" for a in first) == 1200
    assert sum(a.expert == "expert-002" for a in first) == 0
    times = [a.arrived_ms for a in load.arrivals]
    assert times == sorted(times)
    assert times[-1] < load.horizon_ms == 1_200_000


def test_the_busiest_within_the_horizon_become_experts() -> None:
    load = from_rates(RATES, experts=2, horizon_s=600, rate_scale=0.1, seed=1)
    assert load.experts == ("expert-001", "expert-000")
    assert len(load.arrivals) == 150


def test_equal_seeds_give_equal_arrivals_and_others_do_not() -> None:
    def make(seed: int) -> object:
        return from_rates(RATES, experts=3, horizon_s=1200, rate_scale=0.1, seed=seed).arrivals

    assert make(4) == make(4)
    assert make(4) != make(5)


@pytest.mark.parametrize("cv", [0.3, 1.0, 4.0])
def test_gaps_vary_as_recorded(cv: float) -> None:
    rng = np.random.default_rng(0)
    gaps = np.diff(np.sort(window_times_s(rng, 40_000, cv, 600.0)))
    assert np.mean(gaps) == pytest.approx(600.0 / 40_000, rel=0.02)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, rel=0.1)


def test_extreme_burstiness_is_one_burst_inside_the_window() -> None:
    times = window_times_s(np.random.default_rng(0), 50, 1e6, 600.0)
    assert times.shape == (50,)
    assert times.min() >= 0
    assert times.max() - times.min() < 1e-6
    assert times.max() < 600.0


def test_single_requests_keep_times_and_tokens_and_follow_zipf() -> None:
    count = 20_000
    trace = RequestTrace(np.arange(count) / 10.0, np.full(count, 7), np.full(count, 9))
    load = from_requests(trace, experts=4, horizon_s=1e9, rate_scale=2.0, seed=3)
    assert len(load.arrivals) == count
    assert load.arrivals[10].arrived_ms == pytest.approx(500.0)
    assert {(a.input_tokens, a.output_tokens) for a in load.arrivals} == {(7, 9)}
    counts = load.requests_of()
    assert counts["expert-000"] / counts["expert-003"] == pytest.approx(4.0, rel=0.1)


def test_token_counts_have_the_given_shape() -> None:
    inputs, outputs = TokenShape().draw(np.random.default_rng(0), 50_000)
    assert np.log(inputs).mean() == pytest.approx(6.633, abs=0.05)
    assert np.median(outputs) == pytest.approx(np.exp(5.019), rel=0.03)
    assert inputs.min() >= 1
    assert outputs.max() <= 1_000


def write(path: Path, **columns: list[float]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_both_kinds_of_file_are_read(tmp_path: Path) -> None:
    rates = read_trace(
        write(
            tmp_path / "r",
            t_s=[0, 600, 0, 600],
            rate_rps=[1, 2, 3, 4],
            cv=[1, 1, 2, 2],
            client=[0, 0, 1, 1],
        )
    )
    assert isinstance(rates, RateTrace)
    assert rates.window_s == 600
    assert rates.rate_rps.tolist() == [[1, 2], [3, 4]]
    requests = read_trace(
        write(tmp_path / "q", arrival_s=[2, 1], input_tokens=[5, 6], output_tokens=[0, 8])
    )
    assert isinstance(requests, RequestTrace)
    assert requests.input_tokens.tolist() == [6, 5]
    assert requests.output_tokens.tolist() == [8, 1]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"a": [1.0]}, "neither the columns"),
        ({"arrival_s": [], "input_tokens": [], "output_tokens": []}, "no rows"),
        ({"arrival_s": [-1.0], "input_tokens": [1.0], "output_tokens": [1.0]}, "negative"),
        ({"t_s": [0.0], "rate_rps": [1.0], "cv": [1.0], "client": [0.0]}, "two windows"),
    ],
)
def test_unusable_files_are_refused(
    tmp_path: Path, columns: dict[str, list[float]], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        read_trace(write(tmp_path / "t", **columns))


def test_what_is_no_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text("not parquet")
    with pytest.raises(ConfigError, match="not a readable parquet file"):
        read_trace(path)
    with pytest.raises(ConfigError, match="no such file"):
        read_trace(tmp_path / "missing")
