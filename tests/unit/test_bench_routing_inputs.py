"""What bench/routing_inputs gives the router to read beside its embedding."""

from __future__ import annotations

import numpy as np
import pytest

from bench.routing_inputs import Table, beside, one_hot


def test_labels_become_columns() -> None:
    assert one_hot(["b", "a", "b"]).tolist() == [[0, 1], [1, 0], [0, 1]]


def test_both_halves_have_the_same_weight() -> None:
    own = np.array([[0.6, 0.8], [1.0, 0.0]], dtype=np.float32)
    more = np.array([[3.0, 0.0], [0.0, 0.0]], dtype=np.float32)
    joined = beside(own, more)
    assert joined[0] == pytest.approx(np.sqrt(0.5) * np.array([0.6, 0.8, 1.0, 0.0]))
    assert joined[1] == pytest.approx(np.sqrt(0.5) * np.array([1.0, 0.0, 0.0, 0.0]))
    assert joined.dtype == np.float32


def test_a_table_gives_each_text_its_own_vector() -> None:
    vectors = np.eye(3, dtype=np.float32)
    table = Table(["a", "b", "c"], vectors)
    assert table.embed(["c", "a"]).tolist() == [[0, 0, 1], [1, 0, 0]]
    with pytest.raises(KeyError):
        table.embed(["d"])
