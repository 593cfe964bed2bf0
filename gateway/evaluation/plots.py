"""Small SVG plots, made here: nothing is loaded from anywhere."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

__all__ = ["Series", "plot", "tick_values"]

_COLOURS: Final = ("#0b6e4f", "#2b59c3", "#c1440e", "#8d5a97", "#6b705c")
_LEFT, _TOP, _BOTTOM, _LEGEND = 60, 26, 44, 180
_TICKS: Final = 5
_MARGIN: Final = 0.04
_RADIUS: Final = 4.5
_TEXT_PX: Final = 6.4  # of one character at 12 px, about
_LINE_PX: Final = 13.0

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """Points (x, y); joined by a line, or dots each with a label and radius of its own."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    labels: Sequence[str] = ()
    radii: Sequence[float] = ()
    dashed: bool = False


def plot(
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    *,
    size: tuple[int, int] = (760, 380),
    limits: tuple[float, float] | None = None,
) -> str:
    """One SVG element, ``size`` in pixels; series without points are left out.

    The axes span the points, or ``limits`` both. Series with a name stand in a legend.
    """
    shown = [one for one in series if one.points]
    named = [one for one in shown if one.name]
    width, height = size
    right = width - (_LEGEND + 16 if named else 12)
    xs = [x for one in shown for x, _ in one.points]
    ys = [y for one in shown for _, y in one.points]
    frame = _Frame(limits or _padded(xs), limits or _padded(ys), right, height - _BOTTOM)
    parts = [frame.axes(x_title, y_title)]
    colours = [_COLOURS[i % len(_COLOURS)] for i in range(len(shown))]
    parts += [frame.line(s, c) for s, c in zip(shown, colours, strict=True) if s.line]
    parts += [frame.dots(s, c) for s, c in zip(shown, colours, strict=True) if not s.line]
    parts += [
        _legend_row(right + 16, _TOP + 14 + 18 * row, one.name, colours[shown.index(one)])
        for row, one in enumerate(named)
    ]
    box = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img">{"".join(parts)}</svg>'


def tick_values(low: float, high: float) -> list[float]:
    """Three to seven round values in the range, by steps of 1, 2, 2.5 or 5 times ten^n."""
    rough = 0.75 * (high - low) / _TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(s * unit for s in (1.0, 2.0, 2.5, 5.0, 10.0) if s * unit >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = _MARGIN * (high - low) or abs(high) * _MARGIN or 1.0
    return low - pad, high + pad


def _legend_row(x: float, y: float, name: str, colour: str) -> str:
    return (
        f'<rect x="{x}" y="{y - 9}" width="12" height="10" fill="{colour}"/>'
        f'<text x="{x + 18}" y="{y}">{html.escape(name)}</text>'
    )


@dataclass(slots=True)
class _Frame:
    """The plotting area: ``right`` and ``base`` are its edges in pixels; ``taken`` the boxes of
    labels so far, so that no two are printed over each other."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    right: float
    base: float
    taken: list[Box] = field(default_factory=list)

    def place(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x_range, self.y_range
        across, down = (x - x0) / (x1 - x0), (y1 - y) / (y1 - y0)
        return _LEFT + (self.right - _LEFT) * across, _TOP + (self.base - _TOP) * down

    def axes(self, x_title: str, y_title: str) -> str:
        parts = []
        for y in tick_values(*self.y_range):
            _, at = self.place(self.x_range[0], y)
            parts.append(
                f'<line x1="{_LEFT}" x2="{self.right}" y1="{at:.1f}" y2="{at:.1f}" '
                f'stroke="#e4e4e4"/><text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">'
                f"{y:g}</text>"
            )
        for x in tick_values(*self.x_range):
            at, _ = self.place(x, self.y_range[0])
            parts.append(
                f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{self.base}" y2="{self.base + 4}" '
                f'stroke="#444"/><text x="{at:.1f}" y="{self.base + 16}" '
                f'text-anchor="middle">{x:g}</text>'
            )
        middle = (_LEFT + self.right) / 2
        parts.append(
            f'<path d="M{_LEFT} {_TOP}V{self.base}H{self.right}" fill="none" stroke="#444"/>'
            f'<text x="{middle}" y="{self.base + 36}" text-anchor="middle">'
            f'{html.escape(x_title)}</text><text x="4" y="14">{html.escape(y_title)}</text>'
        )
        return "".join(parts)

    def line(self, series: Series, colour: str) -> str:
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (self.place(*p) for p in series.points))
        dash = ' stroke-dasharray="6 4"' if series.dashed else ""
        return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'

    def dots(self, series: Series, colour: str) -> str:
        labels = list(series.labels) or [""] * len(series.points)
        radii = list(series.radii) or [_RADIUS] * len(series.points)
        parts = []
        for point, label, radius in zip(series.points, labels, radii, strict=True):
            x, y = self.place(*point)
            title = f"<title>{html.escape(label)}</title>" if label else ""
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="{colour}">'
                f"{title}</circle>"
            )
            if label:
                tx, ty = self._label_at(x, y, len(label) * _TEXT_PX)
                parts.append(f'<text x="{tx:.1f}" y="{ty:.1f}">{html.escape(label)}</text>')
        return "".join(parts)

    def _label_at(self, x: float, y: float, wide: float) -> tuple[float, float]:
        """Beside the dot where no other label is and the frame has room, else further below."""
        sides = [x + 7, x - 7 - wide]
        lines = [y - 6 + _LINE_PX * step for step in (0, 1, -1, 2, -2, 3, -3)]
        for ty in lines:
            for tx in sides:
                box = (tx, ty - _LINE_PX + 2, tx + wide, ty + 2)
                inside = tx >= _LEFT and tx + wide <= self.right and _TOP <= ty <= self.base
                if inside and not any(_overlap(box, other) for other in self.taken):
                    self.taken.append(box)
                    return tx, ty
        return sides[0], lines[0]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
