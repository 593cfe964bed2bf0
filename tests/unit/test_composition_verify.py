"""The verifiers of bench/composition: what counts as right, task by task."""

from __future__ import annotations

from contextlib import closing

import pytest

from bench.composition.verify_json import json_is
from bench.composition.verify_measure import states
from bench.composition.verify_number import number_is
from bench.composition.verify_sql import open_database, sql_is
from bench.composition.verify_words import mentions

SETUP = """
CREATE TABLE birds(id INTEGER, kind TEXT, weight INTEGER);
INSERT INTO birds VALUES (1, 'owl', 30), (2, 'gull', 20), (3, 'owl', 50), (4, 'tern', 20);
"""


def _runs_right(output: str, reference: str, *, ordered: bool = False) -> bool:
    with closing(open_database(SETUP)) as db:
        return sql_is(output, reference, [db], ordered=ordered)


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ("SELECT kind FROM birds WHERE weight > 20;", True),
        ("Sure!\n```sql\nSELECT b.kind\nFROM birds b WHERE NOT b.weight <= 20\n```\nDone.", True),
        ("SELECT kind FROM birds WHERE weight > 20 ORDER BY id DESC", True),
        ("SELECT kind FROM birds WHERE weight > 40", False),
        ("SELECT kind, id FROM birds WHERE weight > 20", False),
        ("SELECT kind FROM bird WHERE weight > 20", False),
        ("DELETE FROM birds", False),
        ("I would use SELECT.", False),
        ("", False),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n", False),
        ("SELECT COUNT(*) FROM birds a,birds b,birds c,birds d,birds e,birds f,birds g", False),
    ],
)
def test_sql_is_judged_by_its_rows(output: str, right: bool) -> None:
    assert _runs_right(output, "SELECT kind FROM birds WHERE weight > 20") is right


def test_sql_row_order_counts_only_when_it_is_asked_for() -> None:
    reference, other = "SELECT id FROM birds ORDER BY weight DESC, id", "SELECT id FROM birds"
    assert _runs_right(other, reference)
    assert not _runs_right(other, reference, ordered=True)
    assert _runs_right(reference, reference, ordered=True)


KINDS = {"name": "string", "age": "integer", "tags": "array", "fee": "number"}
SCHEMA = {"type": "object", "properties": {k: {"type": t} for k, t in KINDS.items()}}
SCHEMA["required"] = list(KINDS)
WANTED = {"name": "Bo", "age": 4, "tags": None, "fee": 12}


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ('{"age": 4, "name": "Bo", "tags": null, "fee": 12}', True),
        ('Here: ```json\n{"name": "Bo", "age": 4, "tags": null, "fee": 12.0}\n```', True),
        ('{"name": "Bo", "age": "4", "tags": null, "fee": 12}', False),
        ('{"name": "bo", "age": 4, "tags": null, "fee": 12}', False),
        ('{"name": "Bo", "age": true, "tags": null, "fee": 12}', False),
        ('{"name": "Bo", "age": 4, "tags": [], "fee": 12}', False),
        ('{"name": "Bo", "age": 4, "fee": 12}', False),
        ('{"name": "Bo", "age": 4, "tags": null, "fee": 12, "more": 1}', False),
        ('{"name": "Bo", "age": 4, "tags": null, "fee": 12', False),
        ("[4]", False),
    ],
)
def test_json_with_a_schema_is_judged_by_keys_types_and_values(output: str, right: bool) -> None:
    assert json_is(output, WANTED, SCHEMA) is right


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ('{"plate": "KL 5", "year": 2014, "sold": true, "tags": ["a", "b"]}', True),
        ('{"plate": " kl 5", "year": "2014", "sold": true, "tags": ["A", "b"]}', True),
        ('{"plate": "KL 5", "year": 2014, "sold": 1, "tags": ["a", "b"]}', False),
        ('{"plate": "KL 5", "year": 2015, "sold": true, "tags": ["a", "b"]}', False),
        ('{"plate": "KL 5", "year": 2014, "sold": true, "tags": ["b", "a"]}', False),
        ('{"plate": "KL 5", "year": 2014, "sold": true}', False),
    ],
)
def test_json_without_a_schema_is_judged_by_what_it_says(output: str, right: bool) -> None:
    wanted = {"plate": "KL 5", "year": 2014, "sold": True, "tags": ["a", "b"]}
    assert json_is(output, wanted) is right


def test_a_boolean_for_a_one_is_wrong_although_python_calls_them_equal() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    assert json_is('{"n": 1}', {"n": 1}, schema)
    assert not json_is('{"n": true}', {"n": 1}, schema)


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ("6 * 7 = 42\nAnswer: 42", True),
        ("So the answer is $42.00.", True),
        ("**Answer:** 42 apples of 90", True),
        ("Answer: 42 apples", True),
        ("6 and 7 make 42", True),
        ("Answer: 1,042", False),
        ("42 apples minus 2 is 40", False),
        ("Answer: 42\nAnswer: 43", False),
        ("", False),
    ],
)
def test_arithmetic_is_judged_by_the_final_number(output: str, right: bool) -> None:
    assert number_is(output, 42) is right


@pytest.mark.parametrize(
    ("output", "wanted", "right"),
    [
        ("5 * 1000 = 5000\nAnswer: 5000 m", "5000 metres", True),
        ("Answer: 5,000", "5000 m", True),
        ("Answer: 5000 cm", "5000 m", False),
        ("Answer: 500 m", "5000 m", False),
        ("5 km is equal to 5000 meters.", "5000 m", True),
        ("5 km is equal to 500 meters.", "5000 m", False),
        ("It is 200 minutes.", "200 minutes", True),
        ("Answer: 2:30 p.m.", "2:30 PM", True),
        ("Answer: 2:30 AM", "2:30 PM", False),
        ("Answer: 02:30", "2:30 PM", False),
        ("Answer: 09:05", "9:05", True),
        ("Answer: March 3rd, 2024", "3 March 2024", True),
        ("Answer: 2024-03-03", "3 March 2024", False),
        ("Answer: 4 March 2024", "3 March 2024", False),
        ("Answer: 2 hours and 15 minutes", "2 h 15 min", True),
        ("Answer: 2 h 51 min", "2 h 15 min", False),
        ("Answer: Thursday.", "Thursday", True),
        ("Ten days after Monday is Thursday.", "Thursday", True),
        ("Ten days after Monday is Friday.", "Thursday", False),
        ("Answer: 77°F", "77 °F", True),
        ("", "77 °F", False),
    ],
)
def test_conversions_are_judged_by_what_they_say(output: str, wanted: str, right: bool) -> None:
    assert states(output, [wanted]) is right


def test_any_accepted_answer_will_do() -> None:
    assert states("Answer: half past two", ["14:30", "half past two"])


@pytest.mark.parametrize(
    ("output", "right"),
    [("The capital is Paris.", True), ("PARIS", True), ("Parisian cafés", False), ("", False)],
)
def test_general_answers_are_whole_words(output: str, right: bool) -> None:
    assert mentions(output, ["paris"]) is right
