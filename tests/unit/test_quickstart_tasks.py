"""Generators of the quickstart's training data, and the verifiers that judge its models."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

import pytest

from examples.quickstart.tasks import TASKS, Example, Task, arithmetic, extraction, sql
from examples.quickstart.tasks.extraction_domains import domains, loose_fields
from examples.quickstart.tasks.sql_schema import families

N = 150
tasks = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())


def _drawn(task: Task, split: Any, seed: int = 3, n: int = N) -> list[Example]:
    return task.generate(Random(seed), split, n)


def test_the_tasks_are_named_like_their_experts() -> None:
    assert {name: task.name for name, task in TASKS.items()} == {
        "sql": "sql",
        "json": "json",
        "math": "math",
    }


@tasks
def test_a_seed_fixes_the_examples(task: Task) -> None:
    assert _drawn(task, "train") == _drawn(task, "train")
    assert _drawn(task, "train") != _drawn(task, "train", seed=4)


@tasks
def test_examples_are_distinct_and_survive_json(task: Task) -> None:
    drawn = _drawn(task, "train")
    assert len({e.messages[-1]["content"] for e in drawn}) == N
    revived = [Example(e.messages, e.target, json.loads(json.dumps(e.meta))) for e in drawn[:20]]
    assert all(task.verify(e, e.target) for e in revived)


@tasks
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_verifiers_accept_the_reference(task: Task, split: Any) -> None:
    assert [e for e in _drawn(task, split) if not task.verify(e, e.target)] == []


@tasks
def test_verifiers_reject_another_questions_answer_and_silence(task: Task) -> None:
    drawn = _drawn(task, "heldout", n=60)
    pairs = [(a, b) for a in drawn for b in drawn if a.target != b.target]
    wrong = [p for p in pairs if task.name != "math" or p[0].meta["answer"] != p[1].meta["answer"]]
    accepted = [(a, b) for a, b in Random(1).sample(wrong, 200) if task.verify(a, b.target)]
    assert accepted == []
    assert not any(task.verify(e, "") or task.verify(e, "I do not know.") for e in drawn)


@tasks
def test_no_prompt_and_no_frame_is_in_both_splits(task: Task) -> None:
    module = {"sql": sql, "json": extraction, "math": arithmetic}[task.name]
    assert set(module.FRAMES["train"]).isdisjoint(module.FRAMES["heldout"])
    train, heldout = (
        {e.messages[-1]["content"] for e in _drawn(task, s)} for s in ("train", "heldout")
    )
    assert train.isdisjoint(heldout)


def test_no_condition_is_worded_alike_in_both_splits() -> None:
    def wordings(split: Any) -> list[str]:
        by_operator = (*sql._COMPARE[split].values(), *sql._AGGREGATES[split].values())
        return [w for ws in (sql._TEXT_IS[split], sql._BETWEEN[split], *by_operator) for w in ws]

    assert set(wordings("train")).isdisjoint(wordings("heldout"))


@pytest.mark.parametrize("module", [sql, arithmetic])
def test_no_phrasing_is_in_both_splits(module: Any) -> None:
    train, heldout = module.PHRASES["train"], module.PHRASES["heldout"]
    assert train.keys() - {"drill"} == heldout.keys()
    for key in heldout:
        assert set(train[key]).isdisjoint(heldout[key]), key


# --- SQL -----------------------------------------------------------------------------------------


def _sql_literals(examples: list[Example]) -> set[str]:
    """Text literals and thresholds; LIMIT and HAVING counts are not values of the data."""
    texts = {v for e in examples for v in re.findall(r"'([^']*)'", e.meta["sql"])}
    numbers = (
        re.findall(r"(?:[<>]=?|BETWEEN|AND) (\d+)", e.meta["sql"])
        for e in examples
        if "HAVING" not in e.meta["sql"]
    )
    return texts | {n for found in numbers for n in found}


def test_sql_splits_share_no_table_and_no_literal() -> None:
    unseen_tables = {t.name for t in families("heldout").values()}
    asked = [e.meta["tables"] for e in _drawn(TASKS["sql"], "train", n=600)]
    assert {t["name"] for tables in asked for t in tables}.isdisjoint(unseen_tables)
    known, unseen = (_sql_literals(_drawn(TASKS["sql"], s, n=600)) for s in ("train", "heldout"))
    assert len(known) > 100
    assert len(unseen) > 100
    assert known.isdisjoint(unseen)


def test_sql_covers_joins_nesting_and_distractors() -> None:
    drawn = _drawn(TASKS["sql"], "train", n=400)
    queries = [e.meta["sql"] for e in drawn]
    for construct in (
        " JOIN ",
        "(SELECT AVG(",
        "NOT IN (SELECT",
        " AND (",
        "GROUP BY",
        "HAVING",
        "BETWEEN",
        "ORDER BY",
        "DISTINCT",
    ):
        assert any(construct in q for q in queries), construct
    unused = [e for e in drawn if any(t["name"] not in e.meta["sql"] for t in e.meta["tables"])]
    assert len(unused) > len(drawn) / 5


def _sql_example(reference: str) -> Example:
    tables = [
        {
            "name": "birds",
            "singular": "bird",
            "parent": "",
            "columns": [
                {"name": "id", "kind": "id", "values": [], "low": 0, "high": 0},
                {"name": "kind", "kind": "text", "values": ["owl", "gull"], "low": 0, "high": 0},
                {"name": "weight", "kind": "number", "values": [], "low": 1, "high": 90},
            ],
        }
    ]
    return Example((), reference, {"tables": tables, "sql": reference, "row_seed": 5})


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ("SELECT kind FROM birds WHERE weight > 20;", True),
        (
            "Sure!\n```sql\nSELECT b.kind\nFROM birds b WHERE NOT b.weight <= 20\n```\nIt works.",
            True,
        ),
        ("SELECT kind FROM birds WHERE weight > 20 ORDER BY id DESC", True),
        ("SELECT kind FROM birds WHERE weight > 60", False),
        ("SELECT kind, id FROM birds WHERE weight > 20", False),
        ("SELECT kind FROM bird WHERE weight > 20", False),
        ("DELETE FROM birds", False),
        ("WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n", False),
        ("SELECT COUNT(*) FROM birds a, birds b, birds c, birds d, birds e, birds f", False),
    ],
)
def test_sql_is_judged_by_its_result(output: str, right: bool) -> None:
    assert sql.verify(_sql_example("SELECT kind FROM birds WHERE weight > 20"), output) is right


def test_sql_row_order_counts_only_when_the_reference_orders() -> None:
    example = _sql_example("SELECT id FROM birds ORDER BY weight DESC LIMIT 5")
    assert sql.verify(example, "SELECT id FROM birds ORDER BY weight DESC, id LIMIT 5")
    assert not sql.verify(example, "SELECT id FROM birds ORDER BY weight LIMIT 5")


# --- JSON ----------------------------------------------------------------------------------------


def test_json_splits_share_no_domain_sentence_or_value() -> None:
    train, heldout = {**domains("train"), "loose": list(loose_fields())}, domains("heldout")
    assert train.keys().isdisjoint(heldout)
    said = [
        {s for fields in split.values() for f in fields for s in (*f.says, *f.denies)}
        for split in (train, heldout)
    ]
    assert said[0].isdisjoint(said[1])
    values = [
        {
            str(item)
            for e in _drawn(TASKS["json"], split, n=400)
            for v in e.meta["expected"].values()
            if v is not None and not isinstance(v, bool)
            for item in (v if isinstance(v, list) else [v])
        }
        for split in ("train", "heldout")
    ]
    assert values[0].isdisjoint(values[1])


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ('{"age": 4, "name": "Bo", "tags": null, "fee": 12}', True),
        ('Here: ```json\n{"name": "Bo", "age": 4, "tags": null, "fee": 12.0}\n```', True),
        ('{"name": "Bo", "age": "4", "tags": null, "fee": 12}', False),
        ('{"name": "Bo", "age": true, "tags": null, "fee": 12}', False),
        ('{"name": "Bo", "age": 4, "tags": [], "fee": 12}', False),
        ('{"name": "Bo", "age": 4, "fee": 12}', False),
        ('{"name": "Bo", "age": 4, "tags": null, "fee": 12, "more": 1}', False),
        ('{"name": "Bo", "age": 4, "tags": null, "fee": 12', False),
        ("[4]", False),
    ],
)
def test_json_is_judged_by_keys_types_and_values(output: str, right: bool) -> None:
    kinds = {"name": "string", "age": "integer", "tags": "array", "fee": "number"}
    schema = {"properties": {k: {"type": t} for k, t in kinds.items()}}
    expected = {"name": "Bo", "age": 4, "tags": None, "fee": 12}
    example = Example((), "", {"schema": schema, "expected": expected})
    assert extraction.verify(example, output) is right


def test_a_boolean_for_a_one_is_wrong_although_python_calls_them_equal() -> None:
    example = Example(
        (), "", {"schema": {"properties": {"n": {"type": "integer"}}}, "expected": {"n": 1}}
    )
    assert extraction.verify(example, '{"n": 1}')
    assert not extraction.verify(example, '{"n": true}')


# --- arithmetic ----------------------------------------------------------------------------------


def test_arithmetic_operands_belong_to_one_split() -> None:
    for split in ("train", "heldout"):
        sums = {sum(e.meta["operands"]) % 4 for e in _drawn(TASKS["math"], split)}
        assert (arithmetic.HELDOUT_RESIDUE in sums) is (split == "heldout")
        assert (len(sums) == 1) is (split == "heldout")


def test_every_line_of_working_is_true_and_leads_to_the_answer() -> None:
    for example in _drawn(TASKS["math"], "train", n=300):
        *working, last = example.target.splitlines()
        results = []
        for line in working:
            left, operator, right, result = re.fullmatch(
                r"(-?\d+) ([-+*/]) (-?\d+) = (-?\d+)", line
            ).groups()  # type: ignore[union-attr]
            done = {
                "+": int(left) + int(right),
                "-": int(left) - int(right),
                "*": int(left) * int(right),
                "/": int(left) / int(right),
            }[operator]
            assert done == int(result), line
            results.append(int(result))
        assert last == f"Answer: {results[-1]}"
        assert min(results) >= 0


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ("6 * 7 = 42\nAnswer: 42", True),
        ("So the answer is $42.00.", True),
        ("6 and 7 make 42", True),
        ("Answer: 1,042", False),
        ("42 apples minus 2 is 40", False),
        ("Answer: 42\nAnswer: 43", False),
    ],
)
def test_arithmetic_is_judged_by_the_final_number(output: str, right: bool) -> None:
    assert arithmetic.verify(Example((), "", {"answer": 42}), output) is right
