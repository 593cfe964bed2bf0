"""Small SVG plots, made here: nothing is loaded from anywhere."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

__all__ = ["Series", "plot"]

_COLOURS: Final = ("#0b6e4f", "#2b59c3", "#c1440e", "#8d5a97", "#6b705c", "#111111", "#b8860b")
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 760, 380, 60, 16, 44, 210
_TICKS: Final = 5
_MARGIN: Final = 0.04


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y); joined by a line, or dots each with a label of its own."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    labels: Sequence[str] = ()
    dashed: bool = False


def plot(series: Sequence[Series], x_title: str, y_title: str) -> str:
    """One SVG element; series without points are left out."""
    shown = [one for one in series if one.points]
    xs = [x for one in shown for x, _ in one.points]
    ys = [y for one in shown for _, y in one.points]
    frame = _Frame(_padded(xs), _padded(ys))
    parts = [frame.axes(x_title, y_title)]
    for index, one in enumerate(shown):
        colour = _COLOURS[index % len(_COLOURS)]
        parts.append(frame.line(one, colour) if one.line else frame.dots(one, colour))
        y = _TOP + 14 + 18 * index
        x = _WIDTH - _RIGHT + 16
        parts.append(f'<rect x="{x}" y="{y - 9}" width="12" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 18}" y="{y}">{html.escape(one.name)}</text>')
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">{"".join(parts)}</svg>'


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = _MARGIN * (high - low) or abs(high) * _MARGIN or 1.0
    return low - pad, high + pad


@dataclass(frozen=True, slots=True)
class _Frame:
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def place(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        return _LEFT + width * (x - x0) / (x1 - x0), _TOP + height * (y1 - y) / (y1 - y0)

    def axes(self, x_title: str, y_title: str) -> str:
        parts = []
        for i in range(_TICKS):
            x = self.x_range[0] + (i + 0.5) / _TICKS * (self.x_range[1] - self.x_range[0])
            y = self.y_range[0] + (i + 0.5) / _TICKS * (self.y_range[1] - self.y_range[0])
            px, py = self.place(x, y)
            parts.append(
                f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py:.1f}" y2="{py:.1f}" '
                f'stroke="#e4e4e4"/><text x="{_LEFT - 6}" y="{py + 4:.1f}" text-anchor="end">'
                f'{y:.3f}</text><text x="{px:.1f}" y="{_HEIGHT - _BOTTOM + 16}" '
                f'text-anchor="middle">{x:.3g}</text>'
            )
        base, middle = _HEIGHT - _BOTTOM, (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(
            f'<path d="M{_LEFT} {_TOP}V{base}H{_WIDTH - _RIGHT}" fill="none" stroke="#444"/>'
            f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">'
            f"{html.escape(x_title)}</text>"
            f'<text x="{_LEFT + 6}" y="{_TOP + 10}">{html.escape(y_title)}</text>'
        )
        return "".join(parts)

    def line(self, series: Series, colour: str) -> str:
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.place(*p) for p in series.points))
        dash = ' stroke-dasharray="6 4"' if series.dashed else ""
        return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'

    def dots(self, series: Series, colour: str) -> str:
        labels = list(series.labels) or [""] * len(series.points)
        parts = []
        for point, label in zip(series.points, labels, strict=True):
            x, y = self.place(*point)
            title = f"<title>{html.escape(label)}</title>" if label else ""
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}">{title}</circle>'
            )
            if label:
                parts.append(f'<text x="{x + 7:.1f}" y="{y - 6:.1f}">{html.escape(label)}</text>')
        return "".join(parts)
