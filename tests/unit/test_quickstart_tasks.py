"""Generators of the quickstart's training data, judged by the verifiers that judge its models."""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

import pytest

from examples.quickstart.tasks import TASKS, Example, Task, arithmetic, conversion, extraction
from examples.quickstart.tasks import sql_questions as sql
from examples.quickstart.tasks.json_text import domains
from examples.quickstart.tasks.json_values import pools
from examples.quickstart.tasks.phrasing import expand, keyed_lines, slip
from examples.quickstart.tasks.sql_schema import families

N = 150
STEMS = {
    "sql": sql.STEM,
    "json": extraction.STEM,
    "math": arithmetic.STEM,
    "convert": conversion.STEM,
}
tasks = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())


def _drawn(task: Task, split: Any, seed: int = 3, n: int = N) -> list[Example]:
    return task.generate(Random(seed), split, n)


def test_the_tasks_are_named_like_their_experts() -> None:
    assert {name: task.name for name, task in TASKS.items()} == {name: name for name in STEMS}


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
    said = {e.target: e.target.splitlines()[-1] for e in drawn}
    pairs = [(a, b) for a in drawn for b in drawn if said[a.target] != said[b.target]]
    accepted = [(a, b) for a, b in Random(1).sample(pairs, 200) if task.verify(a, b.target)]
    assert accepted == []
    assert not any(task.verify(e, "") or task.verify(e, "I do not know.") for e in drawn)


@tasks
def test_no_prompt_and_no_phrasing_is_in_both_splits(task: Task) -> None:
    train, heldout = (
        {e.messages[-1]["content"] for e in _drawn(task, s)} for s in ("train", "heldout")
    )
    assert train.isdisjoint(heldout)
    known, unseen = (keyed_lines(STEMS[task.name], s) for s in ("train", "heldout"))
    for key in unseen:
        own = {phrase for phrase in unseen[key] if set(re.findall(r"\{\w+\}", phrase)) != {phrase}}
        assert own.isdisjoint(known.get(key, ())), key


@tasks
def test_few_prompts_share_their_words(task: Task) -> None:
    """Without names, numbers and values, no wording makes up more than a few in a hundred."""
    bare = [
        re.sub(r"[\d\W]+|\b[A-Z]\w+", " ", e.messages[-1]["content"])
        for e in _drawn(task, "train", n=400)
    ]
    assert max(bare.count(text) for text in set(bare)) <= 0.03 * len(bare)


# --- phrasing ------------------------------------------------------------------------------------


def test_every_alternative_is_said_and_brackets_nest() -> None:
    rng = Random(2)
    said = {expand(rng, "[Give|Show [me|us]] [all |]it") for _ in range(200)}
    assert said == {f"{v} {a}it" for v in ("Give", "Show me", "Show us") for a in ("all ", "")}


def test_a_slip_touches_neither_numbers_nor_names() -> None:
    rng, text = Random(3), "Please give Anna Weber 125 of those apples."
    slips = {slip(rng, text, share=1.0) for _ in range(300)}
    assert len(slips - {text}) > 5
    assert all("Anna Weber" in s and "125" in s for s in slips)
    assert slip(rng, text, share=0.0) == text


# --- SQL -----------------------------------------------------------------------------------------


def _sql_literals(examples: list[Example]) -> set[str]:
    """Text literals and thresholds; LIMIT and HAVING counts are not values of the data."""
    plain = [e.meta["sql"] for e in examples if "LIKE" not in e.meta["sql"]]
    texts = {v for query in plain for v in re.findall(r"'([^']*)'", query)}
    numbers = (
        re.findall(r"(?:[<>]=?|=|BETWEEN|AND) (\d+)", query)
        for query in plain
        if "HAVING" not in query
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
        " IN ('",
        " != ",
        "LIKE",
        "COUNT(DISTINCT",
        "GROUP BY",
    ):
        assert any(construct in q for q in queries), construct
    unused = [e for e in drawn if any(t["name"] not in e.meta["sql"] for t in e.meta["tables"])]
    assert len(unused) > len(drawn) / 5


# --- JSON ----------------------------------------------------------------------------------------


def test_json_splits_share_no_domain_sentence_or_name() -> None:
    train, heldout = domains("train"), domains("heldout")
    assert {d.name for d in train}.isdisjoint(d.name for d in heldout)
    said = [
        {phrase for d in split for a in d.attributes for verbs in a.verbs for phrase in verbs}
        for split in (train, heldout)
    ]
    assert said[0].isdisjoint(said[1])
    for pool in ("FIRST", "LAST", "CITY", "COMPANY", "STREET", "TITLE", "FOOD", "TEAM"):
        assert set(pools("train")[pool]).isdisjoint(pools("heldout")[pool]), pool


def test_json_asks_for_less_than_the_text_says_and_sometimes_for_more() -> None:
    drawn = _drawn(TASKS["json"], "train", n=400)
    missing = [e for e in drawn if None in e.meta["expected"].values()]
    assert 0.03 < len(missing) / len(drawn) < 0.3
    kinds = {p["type"] for e in drawn for p in e.meta["schema"]["properties"].values()}
    assert kinds == {"string", "integer", "number", "boolean", "array"}


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


# --- conversion ----------------------------------------------------------------------------------


def test_every_kind_of_conversion_occurs_and_its_equations_hold() -> None:
    drawn = _drawn(TASKS["convert"], "train", n=900)
    assert {e.meta["kind"] for e in drawn} == keyed_lines("convert_phrases", "train").keys() - {
        "frame"
    }
    for example in drawn:
        for left, right in re.findall(r"([\d.+*/ -]*\d[\d.+*/ -]*) = ([\d.]+)", example.target):
            assert eval(left) == pytest.approx(float(right)), example.target
