"""The shipped dashboard and alerts speak of metrics that exist, and of all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.metrics import Metrics
from gateway.worker_gauges import WorkerGauges

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "deploy" / "grafana"


def exported() -> dict[str, set[str]]:
    """Sample names by family, as a scrape shows them."""
    metrics = Metrics()
    WorkerGauges(metrics, ["general"])
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        suffixes = {
            "counter": ["_total"],
            "histogram": ["_bucket", "_sum", "_count"],
            "summary": ["_sum", "_count"],
            "gauge": [""],
        }[family.type]
        found[family.name] = {family.name + suffix for suffix in suffixes}
    return found


def expressions(panels: list[dict[str, Any]]) -> list[str]:
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def named(texts: list[str]) -> set[str]:
    return {name for text in texts for name in re.findall(r"\bcoe_[a-z_]+", text)}


def test_the_dashboard_and_the_code_name_the_same_metrics() -> None:
    dashboard = json.loads((GRAFANA / "coe.json").read_text())
    shown, families = named(expressions(dashboard["panels"])), exported()
    assert shown <= set().union(*families.values())
    hidden = {family for family, samples in families.items() if not samples & shown}
    assert not hidden, "metrics that no panel shows"


def test_alerts_name_metrics_that_exist() -> None:
    groups = yaml.safe_load((GRAFANA / "alerts.yaml").read_text())["groups"]
    used = named([rule["expr"] for group in groups for rule in group["rules"]])
    assert used <= set().union(*exported().values())


_OPERATOR = re.compile(r" (?:[-+*/%^]|[=!<>]=|[<>]|and|or|unless) ")
_AGGREGATION = re.compile(
    r"(?:histogram_quantile\([0-9.]+, )?(?:sum|min|max)(?: by \(([a-z_, ]+)\) | by \(\) |)\("
)


def operands(expression: str) -> list[str]:
    """What stands on the sides of the operators outside of all brackets."""
    depth, begin, found = 0, 0, []
    for place, character in enumerate(expression):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(character, 0)
        operator = _OPERATOR.match(expression, place) if depth == 0 else None
        if operator:
            found.append(expression[begin:place])
            begin = operator.end()
    return [*found, expression[begin:]]


def groupings(expression: str) -> set[frozenset[str]]:
    """The labels that each side is summed by; numbers have none and fit to all."""
    vectors = [side for side in operands(expression) if not re.fullmatch(r"[0-9.]+", side)]
    found = {side: _AGGREGATION.match(side) for side in vectors}
    bare = [side for side, match in found.items() if match is None]
    assert not bare, "without an aggregation there is one line per gateway"
    labels = [match.group(1) or "" for match in found.values() if match]
    return {frozenset(filter(None, one.replace(" ", "").split(","))) for one in labels}


def test_both_sides_of_an_operator_have_the_same_labels() -> None:
    """Otherwise Prometheus matches nothing to nothing, and the panel stays empty."""
    panels = json.loads((GRAFANA / "coe.json").read_text())["panels"]
    groups = yaml.safe_load((GRAFANA / "alerts.yaml").read_text())["groups"]
    texts = expressions(panels) + [rule["expr"] for group in groups for rule in group["rules"]]
    assert [text for text in texts if len(groupings(text)) != 1] == []


@pytest.mark.parametrize("wrong", ["sum by (a) (x) / sum(y)", "sum by (a) (x) - sum by (a, b) (y)"])
def test_different_sides_are_found(wrong: str) -> None:
    assert len(groupings(wrong)) == 2


@pytest.mark.parametrize("bare", ["deriv(x[5m]) * 3600", "increase(x[5m]) - sum(y)"])
def test_so_is_what_is_not_summed(bare: str) -> None:
    with pytest.raises(AssertionError, match="one line per gateway"):
        groupings(bare)


def test_the_documentation_lists_every_metric() -> None:
    text = (ROOT / "docs" / "observability.md").read_text()
    listed = set(re.findall(r"`(coe_[a-z_]+)`", text))
    every = {next(iter(s)) if len(s) == 1 else family for family, s in exported().items()}
    assert listed == every


def test_panels_have_their_own_places() -> None:
    panels = json.loads((GRAFANA / "coe.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels]
    assert len(set(places)) == len(places)
