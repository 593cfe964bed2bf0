"""A result as one self-contained HTML page: tables and SVG plots made here, nothing loaded."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["html_report"]

_COLOURS = ("#0b6e4f", "#c1440e", "#2b59c3", "#8d5a97", "#6b705c", "#111111")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 760, 320, 70, 20, 40
_WAIT_FLOOR_S = 0.01  # a logarithmic axis has no zero
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;
color:#222}table{border-collapse:collapse}td,th{padding:.2rem .7rem;text-align:right;border-bottom:
1px solid #ddd}td:first-child,th:first-child{text-align:left}svg text{font:12px system-ui}"""
_COLUMNS = (
    ("goodput", "{:.4f}"),
    ("p50_wait_s", "{:.2f}"),
    ("p95_wait_s", "{:.2f}"),
    ("p99_wait_s", "{:.2f}"),
    ("max_wait_s", "{:.2f}"),
    ("missed", "{}"),
    ("swaps", "{}"),
    ("swaps_min", "{}"),
    ("hit_rate", "{:.3f}"),
    ("fairness", "{:.3f}"),
)

_BARS = (
    ("Goodput", "goodput", 1.0, "{:.3f}"),
    ("Swaps", "swaps", 1.0, "{:.0f}"),
    ("Hit rate", "hit_rate", 1.0, "{:.3f}"),
    ("Fairness", "fairness", 1.0, "{:.3f}"),
    ("Dollars per million tokens", "cost_micro_usd_per_mtok", 1e6, "{:.3f}"),
)
"""Title, key of a policy's figure, what it is divided by, how it is written."""


def html_report(result: Mapping[str, Any]) -> str:
    """``result``: what ``coe simulate --json`` writes."""
    policies: Mapping[str, Mapping[str, Any]] = result["policies"]
    facts = ", ".join(
        f"{key} {result[key]}"
        for key in ("trace", "experts", "requests", "seed", "rate_scale", "horizon_s")
    )
    parts = [
        f"<h1>coe simulate</h1><p>{html.escape(facts)}</p>",
        _table(policies),
        "<h2>Share of requests that waited at most …</h2>",
        "<p>Wait until the request starts. Never served counts as the caller's whole patience.</p>",
        _wait_plot(policies),
        *_bar_charts(policies),
        "<h2>Wait per expert</h2>",
        "<p>p50, p95 and p99, experts from the busiest to the least busy; logarithmic.</p>",
        *(_expert_plot(name, p) for name, p in policies.items()),
        "<h2>Mean wait per expert, seconds</h2>",
        _expert_table(policies),
    ]
    body = "\n".join(parts)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>coe simulate</title>'
        f"<style>{_STYLE}</style><body>{body}</body></html>\n"
    )


def _bar_charts(policies: Mapping[str, Mapping[str, Any]]) -> list[str]:
    parts = []
    for title, key, unit, shape in _BARS:
        values = {name: (p[key] or 0) / unit for name, p in policies.items()}
        parts += [f"<h2>{title}</h2>", _bars(values, shape)]
    return parts


def _expert_plot(name: str, policy: Mapping[str, Any]) -> str:
    """Three lines over the experts, one for each percentile of their waits."""
    counts: Mapping[str, int] = policy["expert_requests"]
    experts = sorted(counts, key=lambda expert: (-counts[expert], expert))
    waits_s = [policy["expert_wait_s"][expert] for expert in experts]
    longest_s = max((wait[-1] for wait in waits_s), default=1.0)
    decades = max(1, math.ceil(math.log10(max(longest_s, 0.1) / _WAIT_FLOOR_S)))
    marks = [_height_mark(_WAIT_FLOOR_S * 10**n, decades) for n in range(decades + 1)]
    lines = [
        _expert_line([wait[n] for wait in waits_s], decades, colour) + _legend(n, label, colour)
        for n, (label, colour) in enumerate(zip(("p50", "p95", "p99"), _COLOURS, strict=False))
    ]
    return f"<h3>{html.escape(name)}</h3>" + _svg([*marks, *lines], _HEIGHT)


def _expert_line(waits_s: Sequence[float], decades: int, colour: str) -> str:
    step = (_WIDTH - _LEFT - 140) / max(1, len(waits_s) - 1)
    points = " ".join(
        f"{_LEFT + n * step:.1f},{_y(_log_share(wait_s, decades)):.1f}"
        for n, wait_s in enumerate(waits_s)
    )
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _height_mark(wait_s: float, decades: int) -> str:
    y = _y(_log_share(wait_s, decades))
    return (
        f'<line x1="{_LEFT}" x2="{_WIDTH - 140}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>'
        f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{wait_s:g} s</text>'
    )


def _table(policies: Mapping[str, Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{key}</th>" for key, _ in _COLUMNS)
    rows = (
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{shape.format(p[key])}</td>" for key, shape in _COLUMNS)
        + "</tr>"
        for name, p in policies.items()
    )
    return f"<table><tr><th>policy</th>{head}</tr>{''.join(rows)}</table>"


def _expert_table(policies: Mapping[str, Mapping[str, Any]]) -> str:
    first = next(iter(policies.values()))
    counts: Mapping[str, int] = first["expert_requests"]
    experts = sorted(counts, key=lambda expert: (-counts[expert], expert))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in policies)
    rows = (
        f"<tr><td>{html.escape(expert)}</td><td>{counts[expert]}</td>"
        + "".join(f"<td>{p['expert_mean_wait_s'][expert]:.2f}</td>" for p in policies.values())
        + "</tr>"
        for expert in experts
    )
    return f"<table><tr><th>expert</th><th>requests</th>{head}</tr>{''.join(rows)}</table>"


def _wait_plot(policies: Mapping[str, Mapping[str, Any]]) -> str:
    """Cumulative distribution of the waits, time on a logarithmic axis."""
    longest_s = max((p["wait_quantiles_s"][-1] for p in policies.values()), default=1.0)
    decades = max(1, math.ceil(math.log10(max(longest_s, 0.1) / _WAIT_FLOOR_S)))
    marks = [_axis_mark(_WAIT_FLOOR_S * 10**n, decades) for n in range(decades + 1)]
    lines = [
        _line(p["wait_quantiles_s"], decades, colour) + _legend(n, name, colour)
        for n, ((name, p), colour) in enumerate(zip(policies.items(), _COLOURS, strict=False))
    ]
    return _svg([*_share_axis(), *marks, *lines], _HEIGHT)


def _line(quantiles_s: Sequence[float], decades: int, colour: str) -> str:
    last = len(quantiles_s) - 1
    points = " ".join(
        f"{_x(wait_s, decades):.1f},{_y(n / last):.1f}" for n, wait_s in enumerate(quantiles_s)
    )
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _x(wait_s: float, decades: int) -> float:
    return _LEFT + _log_share(wait_s, decades) * (_WIDTH - _LEFT - 140)


def _log_share(wait_s: float, decades: int) -> float:
    """Where the wait stands on a logarithmic axis, from 0 to 1."""
    return math.log10(max(wait_s, _WAIT_FLOOR_S) / _WAIT_FLOOR_S) / decades


def _y(share: float) -> float:
    return _TOP + (1.0 - share) * (_HEIGHT - _TOP - _BOTTOM)


def _axis_mark(wait_s: float, decades: int) -> str:
    x = _x(wait_s, decades)
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_y(1):.1f}" y2="{_y(0):.1f}" stroke="#eee"/>'
        f'<text x="{x:.1f}" y="{_HEIGHT - 15}" text-anchor="middle">{wait_s:g} s</text>'
    )


def _share_axis() -> list[str]:
    return [
        f'<text x="{_LEFT - 8}" y="{_y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>'
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]


def _legend(row: int, name: str, colour: str) -> str:
    y = _TOP + 18 * row + 8
    return (
        f'<rect x="{_WIDTH - 120}" y="{y - 8}" width="12" height="8" fill="{colour}"/>'
        f'<text x="{_WIDTH - 102}" y="{y}">{html.escape(name)}</text>'
    )


def _bars(values: Mapping[str, float], shape: str) -> str:
    most = max([*values.values(), 1e-9])
    rows = []
    for row, ((name, value), colour) in enumerate(zip(values.items(), _COLOURS, strict=False)):
        y, width = 8 + 26 * row, value / most * (_WIDTH - 260)
        rows.append(
            f'<text x="0" y="{y + 14}">{html.escape(name)}</text>'
            f'<rect x="110" y="{y}" width="{width:.1f}" height="18" fill="{colour}"/>'
            f'<text x="{118 + width:.1f}" y="{y + 14}">{shape.format(value)}</text>'
        )
    return _svg(rows, 16 + 26 * len(rows))


def _svg(parts: Sequence[str], height: int) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}">{"".join(parts)}</svg>'
