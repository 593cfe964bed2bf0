"""The state store's breaker, by hand-made time."""

from __future__ import annotations

import pytest
from redis.exceptions import (
    AuthenticationError,
    DataError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from deployments.store_errors import Trouble, classify
from deployments.store_health import Admission, StoreHealth


def down_since(now_ms: float) -> StoreHealth:
    health = StoreHealth(first_backoff_ms=100, max_backoff_ms=400)
    assert health.failed(Admission.NORMAL, now_ms)
    return health


def test_refuses_until_the_back_off_is_over_then_lets_one_probe_through() -> None:
    health = down_since(1_000)
    assert not health.up
    assert health.admit(1_099) is None
    assert health.retry_in_ms(1_040) == 60
    assert health.admit(1_100) is Admission.PROBE
    assert health.admit(1_100) is None


def test_probe_brings_it_back_and_the_back_off_starts_small_again() -> None:
    health = down_since(0)
    probe = health.admit(100)
    assert probe is Admission.PROBE
    assert health.succeeded(probe)
    assert health.up
    assert health.admit(100) is Admission.NORMAL
    health.failed(Admission.NORMAL, 200)
    assert health.retry_in_ms(200) == 100


def test_back_off_doubles_up_to_its_bound() -> None:
    health, now_ms, waits = down_since(0), 0.0, []
    for _ in range(4):
        waits.append(health.retry_in_ms(now_ms))
        now_ms += waits[-1]
        probe = health.admit(now_ms)
        assert probe is Admission.PROBE
        assert not health.failed(probe, now_ms), "a failed probe is no change of state"
    assert waits == [100, 200, 400, 400]


def test_calls_that_fail_together_count_once() -> None:
    health = down_since(0)
    assert not health.failed(Admission.NORMAL, 5)
    assert health.retry_in_ms(5) == 95


def test_answer_to_an_old_call_is_no_proof_of_life() -> None:
    health = down_since(0)
    assert not health.succeeded(Admission.NORMAL)
    assert not health.up


def test_cancelled_probe_gives_its_place_to_the_next_call() -> None:
    health = down_since(0)
    assert health.admit(100) is Admission.PROBE
    health.abandoned(Admission.PROBE)
    assert health.admit(100) is Admission.PROBE


@pytest.mark.parametrize(
    ("error", "trouble"),
    [
        (RedisConnectionError("refused"), Trouble.AWAY),
        (AuthenticationError("invalid"), Trouble.AWAY),
        (TimeoutError(), Trouble.AWAY),
        (OSError(), Trouble.AWAY),
        (ReadOnlyError("replica"), Trouble.AWAY),
        (ResponseError("BUSY a script runs"), Trouble.AWAY),
        (OutOfMemoryError("maxmemory"), Trouble.REFUSED),
        (ResponseError("MISCONF disk"), Trouble.REFUSED),
        (ResponseError("WRONGTYPE hash"), Trouble.DEFECT),
        (ResponseError("ERR script line 3"), Trouble.DEFECT),
        (DataError("None"), Trouble.UNSENT),
    ],
)
def test_each_error_is_laid_at_the_right_door(error: Exception, trouble: Trouble) -> None:
    assert classify(error) is trouble
