"""Feedback as one more observation beside the recorded scores."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experts.errors import InvalidRequest
from experts.types import Endpoint
from gateway.feedback import outcome_rows, parse_feedback
from gateway.feedback_command import read_feedback
from gateway.feedback_fold import fold_feedback
from gateway.wire import parse_request
from routers.outcomes import Outcomes, read_outcomes

PROMPTS = ("How many legs has a spider?", "Write a poem about the sea.")


@pytest.fixture
def outcomes(tmp_path: Path) -> Outcomes:
    ids = ["q0", "q1"]
    pq.write_table(
        pa.table({"query_id": ids, "prompt": list(PROMPTS)}), tmp_path / "queries.parquet"
    )
    rows = [
        {"query_id": q, "expert": e, "score": 0.5, "cost": 0.1} for q in ids for e in ("a", "b")
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "outcomes.parquet")
    return read_outcomes(tmp_path)


def digest(prompt: str) -> str:
    """As the decision log writes it, by the gateway's own parser."""
    body = {"model": "auto", "messages": [{"role": "user", "content": prompt}]}
    text = parse_request(msgspec.json.encode(body), Endpoint.CHAT).routing_text
    return hashlib.sha256(text.encode()).hexdigest()


def test_scores_move_towards_what_people_said(outcomes: Outcomes) -> None:
    row = {"input_sha256": digest(PROMPTS[0]), "expert": "b", "score": 1.0}
    strangers = [row | {"input_sha256": "00"}, row | {"expert": "c"}, row | {"expert": "c"}]
    folded = fold_feedback(outcomes, [row, row, row, *strangers])
    where = outcomes.prompts.index(PROMPTS[0]), outcomes.experts.index("b")
    changed = np.argwhere(folded.outcomes.score != outcomes.score)
    assert changed.tolist() == [list(where)]
    assert folded.outcomes.score[where] == pytest.approx((0.5 + 3.0) / 4)
    assert (folded.rows, folded.cells) == (3, 1)
    assert (folded.unknown_query, folded.unknown_expert) == (1, 2)
    assert folded.outcomes.digest != outcomes.digest, "an artifact says what it was trained on"


def test_an_export_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    record = {
        "decision_id": "d",
        "input_sha256": "ab",
        "expert": "a",
        "score": 0,
        "cost_micro_usd": 5,
        "category": "x",
        "input_tokens": 1,
        "output_tokens": 2,
        "at_ms": 3,
    }
    rows = outcome_rows([record, record | {"score": 1}])
    assert [row["score"] for row in rows] == [1.0], "the last word of a decision counts"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet")
    assert read_feedback(tmp_path / "f.parquet") == rows


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b"{", None),
        (b"[]", None),
        (b'{"score": 1}', "decision_id"),
        (b'{"decision_id": "d"}', "score"),
        (b'{"decision_id": "d", "score": true}', "score"),
        (b'{"decision_id": "d", "score": 1.01}', "score"),
    ],
)
def test_feedback_is_checked_field_by_field(body: bytes, field: str | None) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_feedback(body)
    assert refused.value.field_name == field
