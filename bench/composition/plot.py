"""The plot of a run: accuracy per task of every expert and of the composition, as SVG."""

from __future__ import annotations

import html
from typing import Any

from bench.composition.questions import CATEGORIES

_COLOURS = ("#b8b8b8", "#2b59c3", "#c1440e", "#8d5a97", "#c99700", "#0b6e4f", "#6b705c")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 860, 340, 50, 40, 50


def accuracy_svg(result: dict[str, Any], auto: str) -> str:
    """One group of bars per task and one for all; the composition is the last and darkest bar."""
    models = [m for m in result["per_task"] if m != auto] + [auto]
    groups = [*CATEGORIES, "overall"]
    step = (_WIDTH - _LEFT) / len(groups)
    parts = [_grid()]
    for g, group in enumerate(groups):
        x = _LEFT + g * step
        shares = [
            result["overall"][m] if group == "overall" else result["per_task"][m][group]
            for m in models
        ]
        parts.append(_group(x, step, group, shares))
    parts += [_legend(row, model, auto) for row, model in enumerate(models)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12">'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _y(share: float) -> float:
    return _TOP + (1.0 - share) * (_HEIGHT - _TOP - _BOTTOM)


def _grid() -> str:
    return "".join(
        f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{_y(s):.1f}" y2="{_y(s):.1f}" stroke="#ddd"/>'
        f'<text x="{_LEFT - 6}" y="{_y(s) + 4:.1f}" text-anchor="end">{s:.0%}</text>'
        for s in (0.0, 0.25, 0.5, 0.75, 1.0)
    )


def _group(x: float, step: float, label: str, shares: list[float]) -> str:
    width = (step - 16) / len(shares)
    bars = "".join(
        f'<rect x="{x + 8 + n * width:.1f}" y="{_y(share):.1f}" width="{width - 1.5:.1f}" '
        f'height="{_y(0) - _y(share):.1f}" fill="{_colour(n)}"><title>{share:.1%}</title></rect>'
        for n, share in enumerate(shares)
    )
    middle = x + step / 2
    return f'{bars}<text x="{middle:.1f}" y="{_HEIGHT - 30}" text-anchor="middle">{label}</text>'


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]


def _legend(row: int, model: str, auto: str) -> str:
    x = _LEFT + 8 + row * 120
    name = "composition (auto)" if model == auto else model
    return (
        f'<rect x="{x}" y="12" width="12" height="10" fill="{_colour(row)}"/>'
        f'<text x="{x + 16}" y="21">{html.escape(name)}</text>'
    )
