"""Plots of the evaluation's page: round ticks, labels side by side."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from gateway.evaluation.plots import Series, plot, tick_values


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.41, 0.93, [0.5, 0.6, 0.7, 0.8, 0.9]),
        (-1.2e-5, 9.1e-4, [0.0, 2e-4, 4e-4, 6e-4, 8e-4]),
        (2.3, 76.0, [20.0, 40.0, 60.0]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, ticks: list[float]) -> None:
    assert tick_values(low, high) == ticks


def test_labels_of_dots_in_one_place_stand_apart() -> None:
    names = ["first", "second", "third", "fourth"]
    drawn = plot(
        [
            Series("curve", [(0.0, 0.0), (2.0, 1.0)]),
            Series("dots", [(1.0, 0.5)] * len(names), line=False, labels=names),
        ],
        "x",
        "y",
    )
    places = [
        tuple(map(float, at))
        for name in names
        for at in re.findall(rf'<text x="([\d.]+)" y="([\d.]+)">{name}</text>', drawn)
    ]
    assert len(places) == len(names)
    right, left = (sorted(y for x, y in places if (x > 312) is side) for side in (True, False))
    assert all(b - a >= 12 for column in (left, right) for a, b in pairwise(column))
