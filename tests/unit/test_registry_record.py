"""A host record's JSON form is an interface between versions."""

from __future__ import annotations

import json

import msgspec
import pytest

from deployments.host_record import (
    HostRecord,
    PoolRecord,
    encode_record,
    record_from_json,
    record_to_json,
)

RECORD = HostRecord(
    "h", "http://x", ("a",), resident="a", queue_depths={"a": 1}, swap_ms={"a": 2.5}
)


def test_record_survives_its_json_form() -> None:
    assert record_from_json(record_to_json(RECORD)) == RECORD
    assert json.loads(record_to_json(RECORD)) == json.loads(json.dumps(encode_record(RECORD)))


def test_newer_fields_are_ignored_and_older_records_filled_in() -> None:
    newer = json.dumps({**encode_record(RECORD), "invented_later": [1]}).encode()
    assert record_from_json(newer) == RECORD
    older = b'{"host_id": "h", "url": "http://x", "experts": []}'
    assert record_from_json(older) == HostRecord("h", "http://x", ())


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b'{"host_id": 1, "url": "u", "experts": []}'])
def test_anything_else_is_refused(raw: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        record_from_json(raw)


def test_expert_out_of_service_is_not_served() -> None:
    record = HostRecord("h", "http://x", ("a", "b"), out_of_service={"b": "canary"})
    assert [record.serves(e) for e in ("a", "b", "c")] == [True, False, False]


def test_what_a_host_holds_in_memory_survives_and_is_summed_up() -> None:
    pools = (PoolRecord("x", 100, 30, ("a", "b"), ("a",)), PoolRecord("y", 50, 20, ("c",), ("c",)))
    record = HostRecord("h", "http://x", ("a", "b", "c"), pools=pools, work={"a": (2, 900)})
    assert record_from_json(record_to_json(record)) == record
    assert (record.pool_bytes, record.pooled_bytes) == (150, 50)
    assert record.pooled == {"a", "c"}
    assert [record.reads_disk_for(e) for e in ("a", "b")] == [False, True]
    assert not RECORD.reads_disk_for("a"), "a host that says nothing of its memory"
