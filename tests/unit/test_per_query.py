"""The per-query objective: what wins, and why the terms say so."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experts.errors import ConfigError
from experts.types import Capability, ExpertSpec, Price, SourceKind
from policies.loader import dump_policy, parse_policy
from policies.objective import Limits, choose, expert_terms, price_for_budget
from policies.plan import make_plan
from policies.types import Candidate, Overrides, Plan, Policy

FILE = """
version: 1
default: small
per_query:
  quality_per_usd: 100
  quality_per_s: 0
  output_tokens_expected: 1000
  quality:
    general: {small: 0.6, large: 0.7}
    math: {small: 0.3, large: 0.8}
  confidence_sd: {small: 0.25}
cascade: {calibration: {small: {slope: 4, intercept: 1}}}
caps: {stages: 2, cost_usd: 0.01, deadline_ms: 10000}
"""
SKILLS = frozenset({Capability.CHAT, Capability.LOGPROBS})


def policy(text: str = FILE) -> Policy:
    return parse_policy(text, name="p", file="p.yaml", catalogue_ids={"small", "large"})


def candidate(name: str, usd_per_mtok: int, *, wait_ms: float = 0.0) -> Candidate:
    price = Price(0, usd_per_mtok * 1_000_000)
    spec = ExpertSpec(name, SourceKind.SCRIPTED, "echo", price, 4096, SKILLS)
    return Candidate(spec, expected_wait_ms=wait_ms, resident=wait_ms == 0)


POOL = (candidate("small", 0), candidate("large", 2))  # 1000 tokens of large: 0.002 USD


def plan(rules: Policy, category: str, pool: tuple[Candidate, ...] = POOL, **more: object) -> Plan:
    estimates = more.pop("estimates", None)
    return make_plan(
        rules,
        category,
        pool,
        prompt_tokens=10,
        max_output_tokens=1000,
        overrides=Overrides(),
        estimates=estimates,  # type: ignore[arg-type]
    )


def without_drafts(rules: Policy) -> Policy:
    assert rules.per_query is not None
    return replace(rules, per_query=replace(rules.per_query, confidence_sd={}))


def names(made: Plan) -> tuple[str, ...]:
    return tuple(stage.expert for stage in made.stages)


def test_money_decides_where_quality_is_close() -> None:
    rules = without_drafts(policy())
    assert names(plan(rules, "general"))[0] == "small"  # 0.1 better for 0.2 of quality in money
    assert names(plan(rules, "math"))[0] == "large"


def test_the_routers_estimate_for_the_query_goes_before_the_table() -> None:
    made = plan(without_drafts(policy()), "math", estimates={"small": 0.95})
    assert names(made)[0] == "small"
    assert [(t.expert, t.from_router) for t in made.terms] == [("small", True), ("large", False)]


def test_a_category_without_a_row_is_general() -> None:
    made = plan(without_drafts(policy()), "poetry")
    assert {t.expert: t.quality for t in made.terms} == {"small": 0.6, "large": 0.7}


@pytest.mark.parametrize(("quality_per_s", "winner"), [(0.0, "large"), (0.05, "small")])
def test_a_resident_expert_wins_under_latency_weight(quality_per_s: float, winner: str) -> None:
    rules = without_drafts(policy())
    assert rules.per_query is not None
    rules = replace(
        rules, per_query=replace(rules.per_query, quality_per_usd=0.0, quality_per_s=quality_per_s)
    )
    pool = (candidate("small", 0), candidate("large", 2, wait_ms=4_000))
    made = plan(rules, "general", pool)  # 4 s of swap against 0.1 of quality
    assert names(made)[0] == winner
    swapped = next(t for t in made.terms if t.expert == "large")
    assert not swapped.resident
    assert swapped.latency_term == pytest.approx(4 * quality_per_s)


def test_a_draft_comes_first_and_is_accepted_from_the_next_experts_value_on() -> None:
    made = plan(policy(), "math")
    assert names(made)[:2] == ("small", "large")
    assert made.stages[0].accept is not None
    # large is worth 0.8 - 100 * 0.002 = 0.6; small's 0.3 may still turn out to be above it
    assert made.stages[0].accept.min_confidence == pytest.approx(0.6)


def test_no_draft_without_log_probabilities_or_a_second_stage() -> None:
    silent = replace(POOL[0], spec=replace(POOL[0].spec, capabilities=frozenset({Capability.CHAT})))
    assert names(plan(policy(), "math", (silent, POOL[1])))[0] == "large"
    rules = policy()
    one_stage = replace(rules, caps=replace(rules.caps, stages=1))
    assert names(plan(one_stage, "math"))[0] == "large"


def test_the_price_is_solved_for_a_budget() -> None:
    rules = without_drafts(policy())
    rule = rules.per_query
    assert rule is not None
    worst = {"small": 0, "large": 2000}
    options = (POOL, {"general": 1.0, "math": 1.0}, {}, Limits(2, 10_000, 10_000.0, worst))
    solved, cost, quality = price_for_budget(rule, *options, prompt_tokens=10, budget_micro_usd=1e3)
    assert (cost, quality) == (1_000.0, pytest.approx(0.7))  # math goes to large, general does not
    assert solved.quality_per_usd == pytest.approx(50, rel=1e-3)  # 0.1 of quality for 0.002 USD
    only = (POOL[1:], *options[1:])
    with pytest.raises(ValueError, match=r"cheapest choice costs 2000\.0"):
        price_for_budget(rule, *only, prompt_tokens=10, budget_micro_usd=1)


def test_files_round_trip_and_changes_change_the_digest() -> None:
    rules = policy()
    again = policy(dump_policy(rules))
    assert again == rules
    assert policy(FILE.replace("small: 0.6", "small: 0.61")).digest != rules.digest


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("general: {small: 0.6", "other: {small: 0.6"), "add a row 'general'"),
        (("large: 0.7}", "huge: 0.7}"), "huge"),
        (("confidence_sd: {small", "confidence_sd: {large"), "cascade.calibration.large"),
        (("small: 0.3", "small: 1.3"), "less than or equal to 1"),
        (("confidence_sd:", "confidence_moves: {large: {small: 0.1}}\n  confidence_sd:"), "drafts"),
        (("confidence_sd:", "confidence_moves: {small: {small: 0.1}}\n  confidence_sd:"), "own"),
        (("confidence_sd:", "confidence_moves: {small: {huge: 0.1}}\n  confidence_sd:"), "huge"),
    ],
)
def test_wrong_files_are_refused(change: tuple[str, str], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        policy(FILE.replace(*change))
    assert says in caught.value.message


def test_nothing_that_fits_is_no_choice() -> None:
    rule = policy().per_query
    assert rule is not None
    terms = expert_terms(rule, "math", POOL, prompt_tokens=10, output_tokens_max=1000)
    assert choose(rule, terms, {}, Limits(2, 10, 0.0, {"small": 0, "large": 2000})) is None
