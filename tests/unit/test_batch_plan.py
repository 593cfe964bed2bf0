"""Order of lines, back-off, totals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.batch_lines import Answer, Charge, Lost
from gateway.batch_plan import (
    NO_EXPERT,
    Codes,
    Indices,
    RetryRule,
    Tally,
    duplicates,
    expert_changes,
    make_groups,
    run_order,
)

NAMES = ("a", "b", "c")


def codes(*values: int) -> Codes:
    return np.array(values, dtype=np.int32)


def indices(*values: int) -> Indices:
    return np.array(values, dtype=np.int64)


def test_resident_first_then_the_largest_then_the_unrouted() -> None:
    lines = indices(0, 1, 4, 5, 6, 7, 8)
    groups = make_groups(lines, codes(0, 1, 2, 1, NO_EXPERT, 2, 1), NAMES)
    ordered = run_order(groups, {"a"})
    assert [(g.expert, g.lines.tolist(), g.resident) for g in ordered] == [
        ("a", [0], True),
        ("b", [1, 5, 8], False),
        ("c", [4, 7], False),
        (None, [6], False),
    ]


def test_equal_groups_keep_the_order_of_the_input() -> None:
    groups = make_groups(indices(0, 1, 2, 3), codes(2, 0, 0, 2), NAMES)
    assert [g.expert for g in run_order(groups, set())] == ["c", "a"]


@given(st.lists(st.integers(NO_EXPERT, 2), max_size=40), st.sets(st.sampled_from(NAMES)))
def test_grouping_loses_and_repeats_nothing_and_never_swaps_more(
    values: list[int], resident: set[str]
) -> None:
    lines = np.arange(len(values), dtype=np.int64) * 3
    groups = run_order(make_groups(lines, codes(*values), NAMES), resident)
    assert sorted(i for g in groups for i in g.lines.tolist()) == lines.tolist()
    assert all(g.lines.tolist() == sorted(g.lines.tolist()) for g in groups)
    experts = [g.expert for g in groups]
    assert len(set(experts)) == len(experts)
    routed = sum(e is not None for e in experts)
    assert max(0, routed - 1) <= expert_changes(codes(*values))


def test_changes_are_counted_between_routed_neighbours() -> None:
    assert expert_changes(codes(0, 0, 1, NO_EXPERT, 1, 0, 2)) == 3
    assert expert_changes(codes()) == 0


def test_duplicates_name_the_line_before() -> None:
    digests = np.array([b"x", b"y", b"x", b"x", b"z"], dtype="S16")
    assert duplicates(digests) == [(2, 0), (3, 2)]


# --- back-off ------------------------------------------------------------------------------------

RULE = RetryRule(attempts=4, base_s=1.0, cap_s=3.0, retry_after_max_s=60.0)


def answer(status: int, body: bytes = b"{}", **changes: Any) -> Answer:
    return Answer(status, "r", body, **changes)


def test_back_off_doubles_up_to_its_cap_and_ends() -> None:
    waits = [RULE.wait_s(Lost("reset"), attempt, 1.0) for attempt in (1, 2, 3, 4)]
    assert waits == [1.0, 2.0, 3.0, None]
    assert RULE.wait_s(Lost("reset"), 3, 0.0) == 0.0


def test_retry_after_is_a_floor_with_a_bound() -> None:
    assert RULE.wait_s(answer(503, retry_after_s=20.0), 1, 0.5) == 20.5
    assert RULE.wait_s(answer(429, retry_after_s=9_999.0), 1, 0.0) == 60.0


@pytest.mark.parametrize("status", [200, 400, 401, 402, 404, 413, 500])
def test_what_would_come_again_is_final(status: int) -> None:
    assert RULE.wait_s(answer(status), 1, 0.0) is None


def test_the_gateways_word_ends_retrying() -> None:
    assert RULE.wait_s(answer(502), 1, 0.0) is not None
    assert RULE.wait_s(answer(502, should_retry=False), 1, 0.0) is None


def test_a_refusal_for_want_of_time_is_waited_out_within_bounds() -> None:
    busy = b'{"error":{"code":"deadline_unreachable","message":"later"}}'
    assert RULE.busy_wait_s(answer(503, retry_after_s=20.0, body=busy), 3_599.0, 0.5) == 20.5
    assert RULE.busy_wait_s(answer(503, retry_after_s=20.0, body=busy), 3_600.0, 0.5) is None
    others = (
        answer(503, body=b'{"error":{"code":"expert_out_of_service"}}'),
        answer(503, body=b"<html>"),
        answer(429, body=b'{"error":{"code":"rate_limit_exceeded"}}', should_retry=False),
        Lost("reset"),
    )
    assert [RULE.busy_wait_s(other, 0.0, 0.0) for other in others] == [None] * 4


def test_a_tally_adds_up() -> None:
    tally = Tally()
    for charge in (
        Charge("a", True, 3, 4, 5),
        Charge("a", False, cost_micro_usd=2),
        Charge(None, False),
    ):
        tally.add(charge)
    assert (tally.experts["a"].lines, tally.experts["a"].failed) == (2, 1)
    whole = tally.total
    assert (whole.lines, whole.failed, whole.input_tokens, whole.cost_micro_usd) == (3, 2, 3, 7)
