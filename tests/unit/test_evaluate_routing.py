"""Train, save, load and evaluate on planted outcomes, with an embedder that needs no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gateway.evaluation.evaluate as evaluation
import gateway.evaluation.intervals as intervals
import gateway.evaluation.train_command as train_command
import routers.forest as forest
import routers.trees as trees
from experts.errors import ArtifactError, ConfigError
from gateway.evaluation.evaluate import EvaluateOptions, evaluate, split_by_prompt
from gateway.evaluation.pair_metrics import apgr, call_performance_threshold, gap_recovered
from gateway.evaluation.report import html_report
from gateway.evaluation.train_command import TrainOptions, add_to, train
from policies.frontier import mix_for_budget, solve_frontier
from routers.artifact import load_artifact
from routers.outcomes import read_outcomes
from routers.quality import COMPONENTS
from routers.quality_record import quality_arrays, quality_from_arrays

_SUMS, _WORDS = "sums", "words"
_NOUNS = ("river", "castle", "garden", "lantern", "violin", "harbour", "meadow", "engine")


class WordEmbedder:
    """Unit vectors from hashed words: texts that share words are near."""

    id, digest, dimensions = "words", "0" * 64, 16

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        out = np.zeros((len(texts), self.dimensions), np.float32)
        for i, text in enumerate(texts):
            for word in text.split():
                out[i, hashlib.sha256(word.encode()).digest()[0] % self.dimensions] += 1.0
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)


def _prompt(rng: np.random.Generator, category: str, number: int) -> str:
    if category == _SUMS:
        return f"What is {number} + {rng.integers(10, 99)} * {rng.integers(2, 9)} ?"
    nouns = " and the ".join(rng.choice(_NOUNS, 3))
    return f"Write a short line number {number} about the {nouns} please."


def _write(
    folder: Path, n: int = 240, *, informative: bool = True, confident: bool = False, seed: int = 0
) -> Path:
    """``calculator`` is good at sums, ``writer`` at words; ``all-round`` is dear and even.

    ``confident``: answers come with a log-probability, which mostly tells whether they are right.
    """
    rng = np.random.default_rng(seed)
    chance = {_SUMS: (0.95, 0.15, 0.75), _WORDS: (0.1, 0.9, 0.75)}
    ids, prompts, labels, rows = [], [], [], []
    for i in range(n):
        category = (_SUMS, _WORDS)[i % 2]
        ids.append(f"q{i}")
        prompts.append(_prompt(rng, category, i))
        labels.append(category)
        p = chance[category] if informative else (0.5, 0.6, 0.75)
        for expert, share, cost in zip(
            ("calculator", "writer", "all-round"), p, (1.0, 1.0, 10.0), strict=True
        ):
            rows.append((f"q{i}", expert, float(rng.random() < share), cost))
    folder.mkdir(parents=True, exist_ok=True)
    _table(folder / "queries.parquet", query_id=ids, prompt=prompts, category=labels)
    columns = list(zip(*rows, strict=True))
    names = ("query_id", "expert", "score", "cost")
    table = dict(zip(names, map(list, columns), strict=True))
    if confident:
        right = np.array(table["score"])
        table["confidence"] = list(
            np.log(np.clip(0.3 + 0.4 * right + rng.random(len(right)) / 4, 0, 1))
        )
    _table(folder / "outcomes.parquet", **table)
    (folder / "dataset.json").write_text(json.dumps({"cost_unit": "coins"}))
    return folder


def _table(file: Path, **columns: list[Any]) -> None:
    pq.write_table(pa.table(columns), file)


def _quiet(*_: object) -> None:
    return None


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """No model to load, few trees, few resamples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_embedder", lambda *_: WordEmbedder())
        patch.setattr(train_command, "load_embedder", lambda *_: WordEmbedder())
        patch.setattr(trees, "_ROUNDS", 10)
        patch.setattr(forest, "_TREES", 10)
        patch.setattr(intervals, "CURVE_RESAMPLES", 40)
        patch.setattr(intervals, "RESAMPLES", 200)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def result(data: Path, _small: None) -> evaluation.Evaluation:
    return evaluate(EvaluateOptions(data, train=data, budgets=(1.0, 5.0)), _quiet)


def test_a_planted_pattern_is_found(result: evaluation.Evaluation) -> None:
    figures = result.result
    base, router = figures["baselines"], figures["router"]
    assert figures["n"] == 72  # three tenths of 240
    assert figures["training_rows"] == 168
    assert router["best_score"] > base["best_single"]["score"] + 0.1
    assert router["best_score_cost"] < 5.0  # two cheap specialists beat the dear generalist
    assert router["cost_at_best_single_score"] < 5.0
    assert router["auc"] > figures["zero_router"]["auc"] + 0.1
    assert figures["ci95"]["router_best_score"]["low"] > 0
    assert base["query_oracle"]["score"] >= base["category_oracle"]["score"]
    assert set(figures["at_budget"]["5"]) == {"router", "zero_router", "map"}
    assert figures["at_budget"]["1"]["map"]["cost"] <= 1.0
    assert set(figures["calibration"]) == {"calculator", "writer", "all-round"}


def test_a_router_is_worth_no_less_than_its_own_map_on_the_training_evidence(
    result: evaluation.Evaluation,
) -> None:
    seen, corners = result.scored.known.evidence, result.scored.corners
    own = solve_frontier(seen.mapped, seen.expected_cost, seen.score, seen.cost)
    assert np.ptp(seen.mapped, axis=0).max() > 0.3  # the map tells the categories apart
    means = [
        np.mean(
            [
                (1 - mix.share) * mix.cheap.score + mix.share * mix.dear.score
                for mix in (mix_for_budget(route, b) for b in np.linspace(1.0, 10.0, 25))
            ]
        )
        for route in (corners, own)
    ]
    assert means[0] >= means[1] - 1e-3


def test_part_of_the_training_rows_is_scored_on_the_same_queries(
    data: Path, result: evaluation.Evaluation
) -> None:
    options = EvaluateOptions(data, train=data, train_share=0.75)
    part = evaluate(options, _quiet, WordEmbedder())
    assert part.result["training_rows"] == 126  # of 168
    assert part.scored.outcomes.query_ids == result.scored.outcomes.query_ids


def test_the_page_shows_curves_and_regrets_and_loads_nothing(
    result: evaluation.Evaluation,
) -> None:
    page = html_report(result)
    assert page.count("<svg") == 4  # curves, and a reliability diagram per expert
    zero = result.result["ci95"]["router_at_5_minus_zero_router"]["difference"]
    assert f"{zero:+.4f} (" in page
    assert "Worst regrets" in page
    assert "calculator" in page
    assert "src=" not in page
    assert "@import" not in page


def test_estimates_without_a_pattern_fall_back_to_single_experts(tmp_path: Path) -> None:
    noise = _write(tmp_path / "noise", informative=False)
    figures = evaluate(EvaluateOptions(noise, train=noise, seed=1), _quiet).result
    single = figures["baselines"]["best_single"]["score"]
    assert abs(figures["router"]["best_score"] - single) < 0.05


def test_a_saved_router_scores_as_the_one_in_memory(data: Path, tmp_path: Path) -> None:
    fresh = _write(tmp_path / "fresh", 120, seed=9)
    options = TrainOptions(data, tmp_path / "router", 0, "2026-11-22T00:00:00+00:00", "x")
    report = train(options, _quiet)
    saved = evaluate(EvaluateOptions(fresh, artifact=tmp_path / "router"), _quiet).result
    direct = evaluate(EvaluateOptions(fresh, train=data), _quiet).result
    assert saved["router"]["auc"] == pytest.approx(direct["router"]["auc"], abs=2e-3)
    assert load_artifact(tmp_path / "router").digest == report["artifact_digest"]
    with pytest.raises(ConfigError, match="trained on every prompt"):
        evaluate(EvaluateOptions(data, artifact=tmp_path / "router"), _quiet)


def test_arrays_that_lack_an_opinion_with_a_weight_are_refused(data: Path, tmp_path: Path) -> None:
    """As in a folder that was trained when the opinions were others: it must not score worse."""
    train(TrainOptions(data, tmp_path / "router", 0, "2026-11-23T00:00:00+00:00", "x"), _quiet)
    saved = load_artifact(tmp_path / "router").quality
    assert saved is not None
    arrays = quality_arrays(saved.model, saved.evidence)
    absent = next(name for name in COMPONENTS[1:] if getattr(saved.model, name) is None)
    mixing = arrays["mixing"].copy()
    mixing[1, COMPONENTS.index(absent)] = 0.3
    assert quality_from_arrays(saved.record, arrays)
    with pytest.raises(ValueError, match=f"{absent} has a weight and no arrays"):
        quality_from_arrays(saved.record, {**arrays, "mixing": mixing})


def _of_a_pair(folder: Path) -> Path:
    rows = pq.read_table(folder / "outcomes.parquet").to_pylist()
    kept = [row for row in rows if row["expert"] != "writer"]
    pq.write_table(pa.Table.from_pylist(kept), folder / "outcomes.parquet")
    return folder


def test_the_result_is_complete_and_an_artifact_scores_its_cascade_too(tmp_path: Path) -> None:
    folder = _of_a_pair(_write(tmp_path / "pair", confident=True))
    fresh = _of_a_pair(_write(tmp_path / "fresh", 120, confident=True, seed=3))
    train(TrainOptions(folder, tmp_path / "router", 0, "now", "x"), _quiet)
    budgets = (2.0, 5.0)
    saved = evaluate(EvaluateOptions(fresh, artifact=tmp_path / "router", budgets=budgets), _quiet)
    direct = evaluate(EvaluateOptions(fresh, train=folder, budgets=budgets), _quiet)
    figures = saved.result
    json.dumps(figures, allow_nan=False)
    assert figures.keys() == direct.result.keys()
    assert figures["admitted"] == direct.result["admitted"]
    curve = {"curve", "auc", "aiq", "best_score", "best_score_cost", "cost_at_best_single_score"}
    pair = {"apgr", "cpt50", "cpt80"}
    assert figures["router"].keys() >= curve | pair
    assert figures["cascade"].keys() >= curve | pair
    assert figures["ci95"].keys() == {
        *(name for name in figures["baselines"] if name != "best_single"),
        "router_best_score", "router_best_score_minus_domain_map",
        "router_auc_minus_zero_router", "apgr_minus_domain_map",
        "cascade_best_score", "cascade_at_half_cost_of_best_single", "cascade_auc_minus_router",
        *(f"{way}_at_{b}" for way in ("router", "zero_router", "map") for b in (2, 5)),
        *(f"router_at_{b}_minus_{way}" for way in ("zero_router", "map") for b in (2, 5)),
    }  # fmt: skip
    for name in ("auc", "apgr"):
        assert figures["cascade"][name] == pytest.approx(direct.result["cascade"][name], abs=5e-3)
    single = figures["baselines"]["best_single"]["score"]
    for name, score in {
        "cascade_best_score": figures["cascade"]["best_score"],
        "router_at_5": figures["at_budget"]["5"]["router"]["score"],
        "zero_router_at_5": figures["at_budget"]["5"]["zero_router"]["score"],
        "map_at_2": figures["at_budget"]["2"]["map"]["score"],
    }.items():
        interval = figures["ci95"][name]
        assert interval["difference"] == pytest.approx(score - single, abs=1e-9), name
        assert interval["low"] <= interval["difference"] <= interval["high"], name
    page = html_report(saved)
    best = figures["ci95"]["cascade_best_score"]["difference"]
    assert f">cascade best score</td><td>{figures['cascade']['best_score']:.4f}" in page
    assert f"{best:+.4f} (" in page


def test_a_new_expert_joins_and_leaves_the_others_as_they_were(tmp_path: Path) -> None:
    folder = _write(tmp_path / "all", confident=True)
    outcomes = pq.read_table(folder / "outcomes.parquet").to_pylist()
    queries = pq.read_table(folder / "queries.parquet").to_pylist()
    known = [r for r in outcomes if r["expert"] != "writer"]
    profiled = {q["query_id"] for q in queries[:80]}
    new = [r for r in outcomes if r["expert"] == "writer" and r["query_id"] in profiled]
    for name, rows, some in (("known", known, queries), ("profile", new, queries[:80])):
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(some), tmp_path / name / "queries.parquet")
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "outcomes.parquet")
    train(TrainOptions(tmp_path / "known", tmp_path / "old", 0, "now", "x"), _quiet)
    options = TrainOptions(tmp_path / "profile", tmp_path / "new", 0, "now", "x")
    (report,) = add_to(tmp_path / "old", options)["joined"]
    assert report["admitted"]
    old, joined = load_artifact(tmp_path / "old"), load_artifact(tmp_path / "new")
    assert old.quality is not None
    assert joined.quality is not None
    assert joined.quality.experts == ("all-round", "calculator", "writer")
    assert np.array_equal(joined.quality.model.table, old.quality.model.table)
    fresh = _write(tmp_path / "fresh", 120, confident=True, seed=5)
    figures = evaluate(EvaluateOptions(fresh, artifact=tmp_path / "new"), _quiet).result
    assert old.quality.evidence.confidence is not None
    assert "cascade" not in figures  # the writer never answered the training prompts
    assert figures["calibration"]["writer"]["brier"] < 0.18  # its mean score alone: about .25
    with pytest.raises(ArtifactError, match="other experts"):
        evaluate(EvaluateOptions(fresh, artifact=tmp_path / "old"), _quiet)
    with pytest.raises(ConfigError, match="in the artifact already"):
        add_to(tmp_path / "new", options)


@pytest.mark.parametrize(
    "idle",
    [{"train": Path("x")}, {"holdout": 0.2}, {"drop_conflicts": True}, {"embedder": "other"}],
)
def test_what_only_training_uses_is_refused_with_a_saved_artifact(
    data: Path, idle: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match="is for training"):
        evaluate(EvaluateOptions(data, artifact=Path("router"), **idle), _quiet)


@pytest.mark.parametrize("holdout", [0.0, 1.0, -0.1])
def test_a_share_that_leaves_nothing_on_one_side_is_refused(data: Path, holdout: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        evaluate(EvaluateOptions(data, train=data, holdout=holdout), _quiet)


def test_folders_with_other_experts_are_named_apart(data: Path, tmp_path: Path) -> None:
    one = tmp_path / "one"
    one.mkdir()
    rows = pq.read_table(data / "outcomes.parquet").to_pylist()
    kept = [row for row in rows if row["expert"] != "writer"]
    pq.write_table(pa.Table.from_pylist(kept), one / "outcomes.parquet")
    (one / "queries.parquet").write_bytes((data / "queries.parquet").read_bytes())
    with pytest.raises(ConfigError, match=r"here \['all-round', 'calculator'\]"):
        evaluate(EvaluateOptions(data, train=one), _quiet)
    with pytest.raises(ConfigError, match="coe data import"):
        evaluate(EvaluateOptions(tmp_path / "nowhere", train=data), _quiet)


def test_equal_prompts_stay_on_one_side(tmp_path: Path) -> None:
    folder = _write(tmp_path / "twice", 100)
    queries = pq.read_table(folder / "queries.parquet").to_pylist()
    for query in queries[50:]:
        query["prompt"] = queries[int(query["query_id"][1:]) - 50]["prompt"]
    pq.write_table(pa.Table.from_pylist(queries), folder / "queries.parquet")
    outcomes = read_outcomes(folder)
    rest, held = split_by_prompt(outcomes, 0.3, 0)
    assert len(rest) + len(held) == 100
    assert not {outcomes.texts[i] for i in rest} & {outcomes.texts[i] for i in held}


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [("score", 1.5, "0 to 1"), ("cost", -1.0, "0 or more"), ("query_id", "nobody", "is not in")],
)
def test_bad_outcomes_are_refused_with_the_reason(
    tmp_path: Path, column: str, value: object, message: str
) -> None:
    folder = _write(tmp_path / "bad", 40)
    rows = pq.read_table(folder / "outcomes.parquet").to_pylist()
    rows[3][column] = value
    pq.write_table(pa.Table.from_pylist(rows), folder / "outcomes.parquet")
    with pytest.raises(ConfigError, match=message):
        read_outcomes(folder)


def test_queries_that_miss_an_expert_are_counted_and_left_out(tmp_path: Path) -> None:
    folder = _write(tmp_path / "gap", 40)
    rows = pq.read_table(folder / "outcomes.parquet").to_pylist()
    pq.write_table(pa.Table.from_pylist(rows[1:]), folder / "outcomes.parquet")
    outcomes = read_outcomes(folder)
    assert (len(outcomes), outcomes.incomplete) == (39, 1)


def test_pair_metrics_of_known_orders() -> None:
    gain = np.array([1.0] * 25 + [0.0] * 75)
    perfect = gap_recovered(gain, gain, seed=0)
    assert call_performance_threshold(perfect, 0.8) == pytest.approx(20.0)
    assert apgr(perfect) > 0.85
    chance = np.mean([apgr(gap_recovered(np.zeros(100), gain, seed)) for seed in range(200)])
    assert chance == pytest.approx(0.5, abs=0.02)
    assert call_performance_threshold(gap_recovered(gain, -gain, 0), 2.0) is None
