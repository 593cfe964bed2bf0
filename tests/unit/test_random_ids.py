"""Ids are 128 bits, never repeat, and do not continue one another."""

from __future__ import annotations

import re

from gateway.random_ids import RandomIds


def test_ids_are_distinct_over_several_refills_and_generators() -> None:
    one, other = RandomIds("dec-"), RandomIds()
    ids = [one() for _ in range(1_000)]
    assert all(re.fullmatch(r"dec-[0-9a-f]{32}", found) for found in ids)
    others = [other() for _ in range(1_000)]
    assert all(re.fullmatch(r"[0-9a-f]{32}", found) for found in others)
    assert len({found[-32:] for found in ids + others}) == 2_000
