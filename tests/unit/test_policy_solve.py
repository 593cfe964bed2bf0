"""``coe policy solve``: the map within a budget, the file it makes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from experts.errors import ConfigError
from gateway.cli import app
from gateway.policy_solve import Budget, policy_text, solve_map
from policies.loader import load_policy, parse_policy
from routers.outcomes import read_outcomes

ROWS = 40
SCORES = {  # by category and expert: "large" is best at code, "maths" at sums, "small" is cheap
    "code": {"small": 0.2, "large": 0.9, "maths": 0.1},
    "general": {"small": 0.7, "large": 0.8, "maths": 0.2},
    "sums": {"small": 0.1, "large": 0.5, "maths": 0.9},
}
COSTS = {"small": 1.0, "large": 10.0, "maths": 3.0}
EXPERT = """
  {name}:
    source: {{scripted: echo}}
    price: {{input_usd_per_mtok: 1, output_usd_per_mtok: 1}}
    context_tokens: 4096{size}
"""
SIZES = {"small": "1B", "large": "10B", "maths": "3B"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    queries, outcomes = [], []
    for category, experts in SCORES.items():
        for number in range(ROWS):
            query = f"{category}-{number}"
            queries.append({"query_id": query, "prompt": query, "category": category})
            for expert, score in experts.items():
                right = float(number < score * ROWS)
                row = {"query_id": query, "expert": expert, "score": right, "cost": COSTS[expert]}
                outcomes.append(row)
    pq.write_table(pa.Table.from_pylist(queries), folder / "queries.parquet")
    pq.write_table(pa.Table.from_pylist(outcomes), folder / "outcomes.parquet")
    return folder


def write_config(folder: Path, sizes: dict[str, str]) -> Path:
    lines = [
        EXPERT.format(name=name, size=f"\n    parameters: {size}" if size else "")
        for name, size in sizes.items()
    ]
    path = folder / "coe.yaml"
    path.write_text("experts:" + "".join(lines))
    return path


@pytest.mark.parametrize(
    ("budget", "routes"),
    [
        (Budget(), {"code": "large", "general": "large", "sums": "maths"}),
        (Budget(mean_cost=5.0), {"code": "large", "general": "small", "sums": "maths"}),
        (Budget(mean_cost=1.0), dict.fromkeys(SCORES, "small")),
        (Budget(parameters=4.0), {"code": "small", "general": "small", "sums": "maths"}),
        (Budget(parameters=11.0), {"code": "large", "general": "large", "sums": "large"}),
    ],
)
def test_each_category_gets_what_the_budget_allows(
    data: Path, budget: Budget, routes: dict[str, str]
) -> None:
    sizes = {"small": 1, "large": 10, "maths": 3}
    solution = solve_map(read_outcomes(data), budget, sizes)
    assert solution.routes == routes
    assert solution.default == routes["general"]
    score, cost = solution.score_and_cost
    assert score == pytest.approx(sum(SCORES[c][e] for c, e in routes.items()) / 3)
    assert cost == pytest.approx(sum(COSTS[e] for e in routes.values()) / 3)


def test_the_text_is_a_policy_with_that_map(data: Path) -> None:
    solution = solve_map(read_outcomes(data), Budget())
    text = policy_text(solution, cap_usd=0.25, description="why")
    policy = parse_policy(text, name="auto", file="auto.yaml", catalogue_ids=tuple(COSTS))
    assert {c: r.experts for c, r in policy.routes.items()} == {
        "code": ("large",),
        "sums": ("maths",),
    }
    assert policy.default.experts == policy.fallbacks == ("large",)
    assert policy.caps.cost_micro_usd == 250_000


def test_what_cannot_be_solved_is_refused_with_the_reason(data: Path) -> None:
    outcomes = read_outcomes(data)
    with pytest.raises(ConfigError, match="below the least cost"):
        solve_map(outcomes, Budget(mean_cost=0.5))
    with pytest.raises(ConfigError, match="holds no expert"):
        solve_map(outcomes, Budget(parameters=0.5), {"small": 1, "large": 10, "maths": 3})
    with pytest.raises(ConfigError, match="not known of maths"):
        solve_map(outcomes, Budget(parameters=5), {"small": 1, "large": 10, "maths": None})


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["policy", "solve", *arguments])


def test_the_command_writes_a_policy_and_its_figures(data: Path, tmp_path: Path) -> None:
    out, figures = tmp_path / "auto.yaml", tmp_path / "figures.json"
    sizes = {name: size for name, size in SIZES.items() if name != "large"}
    arguments = ("--data", str(data), "--cap-usd", "0.01", "--max-parameters", "4B")
    config = write_config(tmp_path, sizes)
    done = run(*arguments, "--config", str(config), "--out", str(out), "--json", str(figures))
    assert done.exit_code == 0, done.output
    assert "left out, not in the configuration: large" in done.output
    assert load_policy(out, tuple(sizes)).routes["sums"].experts == ("maths",)
    told = json.loads(figures.read_text())
    assert told["routes"] == {"code": "small", "general": "small", "sums": "maths"}
    assert told["best_single"]["expert"] == "maths"
    assert told["map"]["score"] == pytest.approx((0.2 + 0.7 + 0.9) / 3)


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (("--max-cost", "1", "--max-parameters", "1B"), "not both"),
        (("--max-parameters", "1B"), "--config"),
        (("--json", "-"), "--out FILE"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    data: Path, extra: tuple[str, ...], reason: str
) -> None:
    done = run("--data", str(data), "--cap-usd", "0.01", *extra)
    assert done.exit_code != 0
    assert reason in f"{done.output}{done.exception}"
