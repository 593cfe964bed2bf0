"""Whatever is ordered in whatever sequence, a record stays within its bounds and in itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import InvalidRequest
from gateway.policy_versions import (
    HISTORY_MAX,
    VERSIONS_MAX,
    PolicyRecord,
    Version,
    activated,
    etag,
    override_of,
    released,
    revision_of,
    rolled_back,
    with_canary,
    without_canary,
)

Order = Callable[[PolicyRecord], PolicyRecord]


def version(n: int) -> Version:
    return Version(f"digest{n}", f"text {n}", n)


versions = st.integers(0, 60).map(version)
orders: st.SearchStrategy[Order] = st.one_of(
    versions.map(lambda v: lambda r: activated(r, v, 1)),
    st.tuples(versions, st.floats(0.01, 1.0)).map(lambda vs: lambda r: with_canary(r, *vs)),
    st.just(rolled_back),
    st.just(without_canary),
    st.just(lambda r: released(r, 2)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(orders, max_size=80))
def test_a_record_is_bounded_and_what_it_names_it_holds(sequence: list[Order]) -> None:
    record = PolicyRecord("auto")
    for order in sequence:
        before = record
        try:
            record = order(record)
        except InvalidRequest:
            continue
        assert record.revision == before.revision + 1
        held = {v.digest for v in record.versions}
        assert len(record.versions) == len(held) <= VERSIONS_MAX
        assert len(record.history) <= HISTORY_MAX
        assert {record.active, record.canary} - {None} <= held
        assert {s.digest for s in record.history} - {None} <= held
        assert (record.canary is None) == (record.canary_share == 0.0)
        override_of(record)  # finds every text


@given(versions, versions)
def test_rolling_back_takes_back_the_last_activation(first: Version, second: Version) -> None:
    record = activated(PolicyRecord("auto"), first, 1)
    again = rolled_back(activated(record, second, 2))
    assert again.active == (first.digest if first != second else None)
    with pytest.raises(InvalidRequest, match="no earlier version"):
        rolled_back(PolicyRecord("auto"))


@given(
    st.integers(0, 10**15 - 1), st.one_of(st.none(), st.from_regex(r"[0-9a-f]{16}", fullmatch=True))
)
def test_an_etag_names_revision_and_file(revision: int, digest: str | None) -> None:
    tag = etag(revision, digest)
    assert revision_of(tag, digest) == revision
    assert revision_of(tag, "another") is None
