"""The shipped per-query policy, with the quickstart's own experts and prices."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import load_config
from policies.loader import load_policy
from policies.plan import make_plan
from policies.types import Candidate, Overrides, Plan

ROOT = Path(__file__).parents[2]
EXPERTS = {
    spec.id: spec for spec in load_config(ROOT / "examples/quickstart/coe.yaml").catalogue.specs
}
POLICY = load_policy(ROOT / "policies" / "value.yaml", set(EXPERTS))


def planned(category: str, waits_ms: dict[str, float], **estimates: float) -> Plan:
    """100 prompt tokens; experts without a wait are resident and idle."""
    candidates = [
        Candidate(spec, expected_wait_ms=waits_ms.get(name, 0.0), resident=name not in waits_ms)
        for name, spec in EXPERTS.items()
    ]
    return make_plan(
        POLICY,
        category,
        candidates,
        prompt_tokens=100,
        max_output_tokens=256,
        overrides=Overrides(),
        estimates=estimates or None,
    )


@pytest.mark.parametrize("category", ["sql", "json", "math", "convert", "general"])
def test_with_everything_resident_each_category_goes_to_its_expert(category: str) -> None:
    plan = planned(category, {})
    assert plan.stages[0].expert == category
    assert [stage.accept for stage in plan.stages] == [None, None]  # the second if the first fails
    assert {term.expert for term in plan.terms} <= set(EXPERTS)


def test_a_swap_is_waited_for_only_where_it_is_worth_it() -> None:
    assert planned("math", {"math": 5_000.0}).stages[0].expert == "math"  # costs 0.25 of 0.70
    assert planned("math", {"math": 15_000.0}).stages[0].expert == "convert"
    assert planned("general", {"general": 15_000.0}).stages[0].expert == "convert"


def test_an_estimate_for_the_query_itself_stands_before_the_table() -> None:
    assert planned("math", {}, math=0.1, general=0.6).stages[0].expert == "general"


def test_money_counts() -> None:
    """A specialist's answer costs half as much again: 12 micro-USD, 0.024 of quality."""
    terms = {term.expert: term for term in planned("math", {}).terms}
    assert terms["math"].money_term == pytest.approx(2000 * terms["math"].cost_micro_usd * 1e-6)
    assert terms["math"].money_term > terms["general"].money_term > 0
