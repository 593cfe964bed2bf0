"""Scores, plot and questions of bench/composition, without a gateway."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import httpx
import numpy as np
import pytest

from bench.composition import score
from bench.composition.ask import AUTO, Reply, ask_all
from bench.composition.plot import accuracy_svg
from bench.composition.questions import (
    CATEGORIES,
    GENERAL,
    PARAPHRASE,
    SPECIALISTS,
    Question,
    by_hand,
    heldout_mix,
    paraphrases,
)
from examples.quickstart.tasks import TASKS
from examples.quickstart.train_specialists import Recipe, heldout_examples

PER_TASK = 20


def _question(task: str, number: int) -> Question:
    return Question(f"{task}-{number}", task, "heldout", "?", 8, lambda _: True)


def _reply(question: Question, model: str, right: bool, category: str, swap_ms: float) -> Reply:
    expert = category if model == AUTO else model
    return Reply(question, model, "", right, expert, category, 2, swap_ms)


def _run(model: str, knows: set[str], routed_wrong: int = 0) -> list[Reply]:
    """Answers of a model that is right on the tasks it knows; some general ones go astray."""
    replies = []
    for task in CATEGORIES:
        for n in range(PER_TASK):
            astray = model == AUTO and task == GENERAL and n < routed_wrong
            category = "sql" if astray else task
            right = task in knows and not astray
            replies.append(_reply(_question(task, n), model, right, category, 1.5 * (n < 3)))
    return replies


def _whole_run() -> dict[str, list[Reply]]:
    singles = {name: _run(name, {name}) for name in SPECIALISTS}
    return {AUTO: _run(AUTO, set(CATEGORIES), 5), **singles, GENERAL: _run(GENERAL, {GENERAL})}


def test_the_summary_says_what_happened() -> None:
    runs = _whole_run()
    found = score.summary(runs, runs, AUTO, seed=1)
    assert found["composition"] == 0.95
    assert found["best_single"] == 0.2
    assert found["gain_points"] == 75.0
    assert found["per_task_best"] == 1.0
    assert found["share_of_per_task_best"] == 0.95
    assert found["routing_accuracy"] == found["routing_accuracy_paraphrases"] == 0.95
    assert found["confusion"][GENERAL]["sql"] == 5
    assert found["specialist_gain"] == dict.fromkeys(SPECIALISTS, 100.0)
    assert found["ci95"][0] < 0.75 < found["ci95"][1]
    assert found["swaps"] == 4
    assert found["cost_micro_usd"][AUTO] == 2 * PER_TASK * len(CATEGORIES)


def test_the_interval_is_of_pairs_and_refuses_others() -> None:
    ours, theirs = _run(AUTO, set(CATEGORIES)), _run("sql", {"sql"})
    rng = np.random.default_rng(0)
    assert score.paired_difference(ours, ours, rng) == (0.0, 0.0)
    low, high = score.paired_difference(ours, theirs, rng)
    assert 0.70 < low < 0.8 < high < 0.90
    with pytest.raises(ValueError, match="different questions"):
        score.paired_difference(ours, theirs[1:], rng)


def test_the_plot_is_svg_with_a_bar_for_every_model_and_group() -> None:
    runs = _whole_run()
    root = ElementTree.fromstring(accuracy_svg(score.summary(runs, runs, AUTO, seed=1), AUTO))
    bars = [e for e in root.iter() if e.tag.endswith("rect") and len(e)]
    assert len(bars) == len(runs) * (len(CATEGORIES) + 1)


def test_the_mix_has_all_tasks_and_none_of_the_cards_questions() -> None:
    mix = heldout_mix(5, seed=20)
    assert [q.task for q in mix] != sorted(q.task for q in mix)
    assert {task: sum(q.task == task for q in mix) for task in CATEGORIES} == dict.fromkeys(
        CATEGORIES, 5
    )
    carded = {
        e.messages[-1]["content"]
        for task in TASKS.values()
        for e in heldout_examples(task, Recipe(1))
    }
    assert len(carded & {q.prompt for q in heldout_mix(40, seed=20)}) <= 4  # a short one recurs


def test_there_are_twenty_paraphrases_a_task_and_all_have_a_reachable_answer() -> None:
    found = paraphrases()
    assert min(sum(q.task == task for q in found) for task in CATEGORIES) >= 20
    assert len({q.id for q in found}) == len(found)
    assert not any(q.right("") for q in found)
    assert {q.task for q in found if not q.checkable} <= {GENERAL}


def test_a_line_of_each_task_is_judged_by_its_verifier(tmp_path: Path) -> None:
    rows = [
        ({"task": "sql", "setup": "CREATE TABLE t(a)", "query": "SELECT 1", "ordered": False},
         "SELECT 1;"),
        ({"task": "json", "answer": {"a": 1}}, '{"a": 1}'),
        ({"task": "math", "answer": 4}, "Answer: 4"),
        ({"task": "convert", "answer": "4 m", "accept": ["four metres"]}, "Answer: four metres"),
        ({"task": "general", "accept": ["rome"]}, "It is Rome."),
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({**row, "prompt": "?"}) + "\n" for row, _ in rows))
    read = by_hand(file, PARAPHRASE)
    assert [q.task for q in read] == [row["task"] for row, _ in rows]
    assert all(q.right(answer) for q, (_, answer) in zip(read, rows, strict=True))
    assert not any(q.right("no idea") for q in read)


async def test_a_failed_request_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if body["messages"][0]["content"] == "broken":
            return httpx.Response(503, json={})
        choice = {"message": {"content": "yes"}}
        headers = {"x-coe-expert": "sql", "x-coe-cost-usd": "0.000012", "x-coe-swap-ms": "3.5"}
        return httpx.Response(200, json={"choices": [choice]}, headers=headers)

    real = httpx.AsyncClient

    def client(**kwargs: object) -> httpx.AsyncClient:
        kwargs.pop("limits", None)
        return real(transport=httpx.MockTransport(answer))

    monkeypatch.setattr(httpx, "AsyncClient", client)
    asked = [_question("sql", n) for n in range(3)]
    seen: list[int] = []

    def done() -> None:
        seen.append(1)

    replies = await ask_all("http://gateway/v1", AUTO, asked, concurrency=2, done=done)
    assert [r.cost_micro_usd for r in replies] == [12] * 3
    assert len(seen) == 3
    broken = [*asked, replace(asked[0], prompt="broken")]
    with pytest.raises(httpx.HTTPStatusError):
        await ask_all("http://gateway/v1", AUTO, broken, concurrency=2, done=done)
