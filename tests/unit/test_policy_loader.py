from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml

import policies
from experts.errors import ConfigError
from policies.loader import dump_policy, load_policy, parse_policy, policy_json_schema
from policies.types import Calibration, Caps, Policy, Route, StreamWindow

IDS = ("general", "sql", "json", "math", "convert")
GOOD = """\
version: 1
description: for tests
routes:
  sql: sql
  math: [math, general]
default: general
fallbacks: [general]
cascade:
  min_confidence: 0.7
  calibration: {math: {slope: 4.0, intercept: 2.0}}
  stream_window: {tokens: 8, hold_ms: 900}
caps: {stages: 2, cost_usd: 0.01, deadline_ms: 60000}
max_output_tokens_default: 128
"""


def parse(text: str, name: str = "p") -> Policy:
    return parse_policy(text, name=name, file="p.yaml", catalogue_ids=IDS)


def refusal(text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return caught.value


def test_a_file_becomes_a_policy_named_by_its_stem(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    policy = load_policy(path, IDS)
    assert policy.name == "mine"
    assert policy.routes == {"sql": Route(("sql",)), "math": Route(("math", "general"))}
    assert policy.default == Route(("general",))
    assert policy.calibrations == {"math": Calibration(4.0, 2.0)}
    assert policy.window == StreamWindow(8, 900)
    assert policy.caps == Caps(stages=2, cost_micro_usd=10_000, deadline_ms=60_000)
    assert policy.on_state_outage == {"routing": "open", "budgets": "closed"}


def test_an_unknown_expert_has_line_and_nearest_name() -> None:
    error = refusal(GOOD.replace("sql: sql", "sql: sqll"))
    assert (error.line, error.key, error.nearest) == (4, "routes.sql[0]", "sql")


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [("[math, general]", "[math,\n    genral]", 6), ("fallbacks: [general]", "fallbacks: [x]", 7)],
)
def test_every_place_that_names_an_expert_is_checked(old: str, new: str, line: int) -> None:
    assert refusal(GOOD.replace(old, new)).line == line


def test_names_are_not_checked_without_a_catalogue() -> None:
    text = GOOD.replace("sql: sql", "sql: elsewhere")
    policy = parse_policy(text, name="p", file="p.yaml", catalogue_ids=None)
    assert policy.routes["sql"] == Route(("elsewhere",))


def test_a_judged_expert_without_calibration_is_told_what_to_add() -> None:
    error = refusal(GOOD.replace("{math: {slope: 4.0, intercept: 2.0}}", "{}"))
    assert (error.line, error.key) == (5, "routes.math[0]")
    assert "add cascade.calibration.math: {slope: …, intercept: …}" in error.reason


@pytest.mark.parametrize(
    ("old", "new", "fragment"),
    [
        ("[math, general]", "[math, math]", "names an expert twice"),
        ("[math, general]", "{}", "expected an expert or a list"),
        ("slope: 4.0", "slope: -4.0", "must be greater than 0, got -4.0"),
        ("cost_usd: 0.01", "cost_usd: free", "expected an amount in USD"),
        ("cost_usd: 0.01, ", "", "is required"),
        ("stages: 2", "stages: 0", "must be greater than or equal to 1, got 0"),
        ("min_confidence: 0.7", "min_confidence: 70", "must be less than or equal to 1"),
        ("version: 1", "version: 2", "version"),
        ("fallbacks", "falbacks", "Did you mean 'fallbacks'?"),
        ("default: general", "default: []", "at least 1"),
    ],
)
def test_values_out_of_range(old: str, new: str, fragment: str) -> None:
    assert fragment in refusal(GOOD.replace(old, new)).message


def test_the_digest_follows_what_decides_and_nothing_else() -> None:
    policy = parse(GOOD)
    assert len(policy.digest) == 16
    same = parse("# comment\n" + GOOD.replace("for tests", "other words"), name="q")
    assert same.digest == policy.digest
    spelt = parse(GOOD.replace("sql: sql", "sql: [sql]").replace("60000", "60000.0"))
    assert spelt.digest == policy.digest
    assert parse(GOOD.replace("0.01", "0.02")).digest != policy.digest
    assert parse(GOOD.replace("[math, general]", "math")).digest != policy.digest


def test_dump_and_load_give_an_equal_policy() -> None:
    policy = parse(GOOD)
    assert parse(dump_policy(policy)) == policy
    assert dump_policy(parse(dump_policy(policy))) == dump_policy(policy)


def test_a_file_name_that_cannot_be_a_policy_name(tmp_path: Path) -> None:
    path = tmp_path / "My Policy.yaml"
    path.write_text(GOOD)
    with pytest.raises(ConfigError, match="file name"):
        load_policy(path, IDS)


def test_shipped_policies_load_and_fit_the_exported_schema() -> None:
    schema = policy_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    shipped = sorted(Path(policies.__file__).parent.glob("*.yaml"))
    assert [path.stem for path in shipped] == ["auto", "cascade", "cheap", "value"]
    for path in shipped:
        load_policy(path, IDS)
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"version": 1, "default": "a", "caps": {}}, schema)


def test_the_example_in_the_documentation_loads() -> None:
    text = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()
    example = text.split("```yaml\n", 1)[1].split("```", 1)[0]
    assert parse(example).routes["math"] == Route(("general", "math"))
