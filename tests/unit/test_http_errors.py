"""Every error class has its row, and the answer carries what clients act on."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from experts import errors as e
from gateway.http_errors import TABLE, answer_for, error_object


def classes(root: type[e.CoeError] = e.CoeError) -> Iterator[type[e.CoeError]]:
    yield root
    for child in root.__subclasses__():
        yield from classes(child)


def test_every_error_class_stands_in_the_table() -> None:
    assert {c for c in classes() if c.__module__ == "experts.errors"} == set(TABLE)


@pytest.mark.parametrize(
    ("error", "status", "headers"),
    [
        (e.QueueFull("x", 3, 1_500.0), 503, {b"retry-after": b"2"}),
        (e.RateLimited("key", 400_000.0), 429, {b"retry-after": b"120"}),
        (e.RateLimited("tokens per minute", None), 429, {b"x-should-retry": b"false"}),
        (e.ScopeDenied("expert", "x"), 403, {}),
        (
            e.BudgetExceeded("key's day", 2, 1, 86_399_001.0),
            402,
            {b"retry-after": b"86400", b"x-should-retry": b"false"},
        ),
        (e.BudgetExceeded("key", 2, 1), 402, {b"x-should-retry": b"false"}),
        (e.UpstreamTimeout("x", "total", 5.0), 504, {b"x-should-retry": b"false"}),
        (e.MethodNotAllowed("GET", "/x", ("POST",)), 405, {b"allow": b"POST"}),
        (e.InvalidRequest("n", "too big"), 400, {}),
    ],
)
def test_status_and_headers(error: e.CoeError, status: int, headers: dict[bytes, bytes]) -> None:
    answer = answer_for(error)
    assert answer.status == status
    sent = dict(answer.headers)
    assert {k: v for k, v in sent.items() if not k.startswith(b"content-")} == headers
    assert int(sent[b"content-length"]) == len(answer.body)
    body = msgspec.json.decode(answer.body)["error"]
    assert body == {
        "message": error.message,
        "type": TABLE[type(error)].type,
        "param": error.param,
        "code": TABLE[type(error)].code,
    }


def test_after_money_was_spent_nobody_is_invited_to_retry() -> None:
    headers = dict(answer_for(e.QueueFull("x", 3, 1_500.0), spent=True).headers)
    assert headers[b"x-should-retry"] == b"false"
    assert b"retry-after" not in headers


@pytest.mark.parametrize(("upstream", "ours"), [(400, 400), (422, 422), (404, 502), (500, 502)])
def test_only_an_expert_that_blames_the_request_is_believed(upstream: int, ours: int) -> None:
    assert answer_for(e.ExpertFailed("x", upstream, "why", "n", "odd")).status == ours


def test_paths_of_our_files_stay_inside() -> None:
    error = e.ConfigError("/etc/coe/secret-place.yaml", 3, "key", "wrong")
    assert "secret-place" not in str(error_object(error))


def test_a_defect_s_message_is_for_a_person() -> None:
    assert "CoeError" not in error_object(e.CoeError())["error"]["message"]
