"""Arrivals from recorded traces: who asks which expert when, and for how many tokens.

Everything random comes from the seed: equal inputs and seed give equal arrivals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = [
    "Arrival",
    "RateTrace",
    "RequestTrace",
    "TokenShape",
    "Workload",
    "from_rates",
    "from_requests",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request. ``expert`` is an expert's id; times in milliseconds from the trace's start."""

    arrived_ms: float
    expert: str
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Arrivals in time order. ``experts``: busiest first, those that nobody asks included."""

    experts: tuple[str, ...]
    arrivals: tuple[Arrival, ...]
    horizon_ms: float

    def requests_of(self) -> dict[str, int]:
        """Expert to number of requests."""
        counts = dict.fromkeys(self.experts, 0)
        for arrival in self.arrivals:
            counts[arrival.expert] += 1
        return counts


@dataclass(frozen=True, slots=True)
class TokenShape:
    """Log-normal token counts, cut to a range. Defaults: mean and deviation of the logarithms of
    azure_2023_conv (19,366 conversations), and its extremes.
    """

    input_log_mean: float = 6.633
    input_log_sd: float = 0.985
    input_max: int = 14_050
    output_log_mean: float = 5.019
    output_log_sd: float = 0.859
    output_max: int = 1_000

    def draw(self, rng: np.random.Generator, count: int) -> tuple[Ints, Ints]:
        inputs = rng.lognormal(self.input_log_mean, self.input_log_sd, count)
        outputs = rng.lognormal(self.output_log_mean, self.output_log_sd, count)
        return _cut(inputs, self.input_max), _cut(outputs, self.output_max)


@dataclass(frozen=True, slots=True)
class RateTrace:
    """Per client and window: requests per second and the coefficient of variation of the gaps.

    ``rate_rps``, ``cv``: arrays of shape (clients, windows); every window lasts ``window_s``.
    """

    window_s: float
    rate_rps: Floats
    cv: Floats


@dataclass(frozen=True, slots=True)
class RequestTrace:
    """Single requests: arrays of equal length, in time order."""

    arrival_s: Floats
    input_tokens: Ints
    output_tokens: Ints


def from_rates(
    trace: RateTrace,
    *,
    experts: int,
    horizon_s: float,
    rate_scale: float,
    seed: int,
    shape: TokenShape | None = None,
) -> Workload:
    """The busiest clients within the horizon (then over the whole trace) become the experts."""
    rng = np.random.default_rng(seed)
    windows = min(trace.rate_rps.shape[1], int(np.ceil(horizon_s / trace.window_s)))
    horizon_s = min(horizon_s, windows * trace.window_s)
    clients = _busiest(trace, windows)[:experts]
    times_s = [_client_times(trace, int(client), windows, rate_scale, rng) for client in clients]
    names = [_name(int(client)) for client in clients]
    owners = np.concatenate([np.full(len(t), n) for n, t in enumerate(times_s)])
    flat_s = np.concatenate(times_s)
    inputs, outputs = (shape or TokenShape()).draw(rng, len(flat_s))
    return _sorted(names, flat_s, owners, inputs, outputs, horizon_s)


def from_requests(
    trace: RequestTrace,
    *,
    experts: int,
    horizon_s: float,
    rate_scale: float,
    seed: int,
    zipf_exponent: float = 1.0,
) -> Workload:
    """Recorded times (divided by ``rate_scale``) and tokens; experts by a Zipf draw."""
    rng = np.random.default_rng(seed)
    times_s = trace.arrival_s / rate_scale
    weights = 1.0 / np.arange(1, experts + 1) ** zipf_exponent
    owners = rng.choice(experts, size=len(times_s), p=weights / weights.sum())
    names = [_name(number) for number in range(experts)]
    last_s = float(times_s[-1]) if len(times_s) else 0.0
    horizon_s = min(horizon_s, np.nextafter(last_s, np.inf))
    return _sorted(names, times_s, owners, trace.input_tokens, trace.output_tokens, horizon_s)


def window_times_s(rng: np.random.Generator, count: int, cv: float, window_s: float) -> Floats:
    """``count`` arrivals in one window, from a gamma renewal process, in no particular order.

    The recorded rate is what was counted, so the process is taken given its count: independent
    gamma gaps of the recorded variation, scaled to fill the window as a circle with a random start.
    An unconditional process that started afresh in each window would bring (cv^2 - 1) / 2 requests
    too many, thousands for the burstiest clients.
    """
    start_s = rng.uniform(0.0, window_s)
    gaps = rng.gamma(1.0 / max(cv, 1e-3) ** 2, size=count)
    total = gaps.sum()
    if total <= 0.0:  # so bursty that every gap but one vanishes: all at one instant
        return np.full(count, start_s)
    times_s: Floats = (start_s + np.cumsum(gaps) / total * window_s) % window_s
    return times_s


def _client_times(
    trace: RateTrace, client: int, windows: int, rate_scale: float, rng: np.random.Generator
) -> Floats:
    times_s = [np.empty(0)]
    for window in range(windows):
        expected = trace.rate_rps[client, window] * trace.window_s * rate_scale
        count = int(expected) + int(rng.random() < expected % 1.0)
        if count:
            offset_s = window * trace.window_s
            cv = float(trace.cv[client, window])
            times_s.append(offset_s + window_times_s(rng, count, cv, trace.window_s))
    return np.concatenate(times_s)


def _busiest(trace: RateTrace, windows: int) -> Ints:
    """Clients by their mean rate within the windows, then over the trace, then by number."""
    within = trace.rate_rps[:, :windows].mean(axis=1)
    overall = trace.rate_rps.mean(axis=1)
    order: Ints = np.lexsort((np.arange(len(within)), -overall, -within))
    return order


def _sorted(
    names: Sequence[str], times_s: Floats, owners: Ints, inputs: Ints, outputs: Ints, end_s: float
) -> Workload:
    order = np.argsort(times_s, kind="stable")
    arrivals = tuple(
        Arrival(float(times_s[i]) * 1e3, names[int(owners[i])], int(inputs[i]), int(outputs[i]))
        for i in order
        if times_s[i] < end_s
    )
    return Workload(_by_requests(names, arrivals), arrivals, end_s * 1e3)


def _by_requests(names: Sequence[str], arrivals: Sequence[Arrival]) -> tuple[str, ...]:
    counts = dict.fromkeys(names, 0)
    for arrival in arrivals:
        counts[arrival.expert] += 1
    return tuple(sorted(names, key=lambda name: (-counts[name], name)))


def _cut(values: Floats, most: int) -> Ints:
    return np.clip(np.rint(values), 1, most).astype(np.int64)


def _name(number: int) -> str:
    return f"expert-{number:03d}"
