"""The shipped dashboard and alerts speak of metrics that exist, and of all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

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
