"""What holds for every objective, pool and budget."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from experts.types import Capability, ExpertSpec, Price, SourceKind
from policies.objective import Limits, choose, expert_terms
from policies.types import Candidate, PerQuery

SKILLS = frozenset({Capability.CHAT, Capability.LOGPROBS})
NAMES = ("a", "b", "c", "d")
unit = st.floats(0.0, 1.0)


@st.composite
def pools(draw: st.DrawFn) -> tuple[PerQuery, list[Candidate], Limits]:
    names = NAMES[: draw(st.integers(1, 4))]
    quality = {name: draw(unit) for name in names}
    spread = {name: draw(st.sampled_from([0.0, 0.1, 0.3])) for name in names}
    candidates = []
    for name in names:
        price = Price(0, draw(st.integers(0, 5_000)) * 1_000_000)
        spec = ExpertSpec(name, SourceKind.SCRIPTED, "echo", price, 4096, SKILLS)
        candidates.append(Candidate(spec, expected_wait_ms=draw(st.floats(0, 5_000))))
    worst = {c.spec.id: c.spec.price.cost_micro_usd(0, 1) for c in candidates}
    limits = Limits(draw(st.integers(1, 3)), draw(st.integers(0, 9_000)), 6_000.0, worst)
    return PerQuery(0.0, 0.0, 1, {"general": quality}, spread), candidates, limits


def chosen(rule: PerQuery, candidates: list[Candidate], limits: Limits):  # type: ignore[no-untyped-def]
    terms = expert_terms(rule, "general", candidates, prompt_tokens=0, output_tokens_max=1)
    return choose(rule, terms, dict.fromkeys(NAMES, True), limits), terms


@given(pools(), st.floats(0.0, 1e4))
def test_caps_are_never_exceeded(
    pool: tuple[PerQuery, list[Candidate], Limits], price: float
) -> None:
    rule, candidates, limits = pool
    choice, _ = chosen(rule.at_price(price), candidates, limits)
    if choice is None:
        assert all(cost > limits.cost_micro_usd for cost in limits.worst_micro_usd.values())
        return
    waits = {c.spec.id: c.expected_wait_ms for c in candidates}
    assert len(choice.experts) <= limits.stages
    assert sum(limits.worst_micro_usd[e] for e in choice.experts) <= limits.cost_micro_usd
    assert sum(waits[e] for e in choice.experts) < limits.deadline_ms


@given(pools(), st.floats(0.0, 1e4), st.floats(0.0, 1e4))
def test_dearer_money_never_buys_more(
    pool: tuple[PerQuery, list[Candidate], Limits], one: float, other: float
) -> None:
    rule, candidates, limits = pool
    low, _ = chosen(rule.at_price(min(one, other)), candidates, limits)
    high, _ = chosen(rule.at_price(max(one, other)), candidates, limits)
    if low is None or high is None:
        assert low is high
        return
    gap = max(one, other) - min(one, other)
    if gap > 1.0:  # values closer than the tie margin may swap at (nearly) equal prices
        slack = 2e-9 * 1e6 / gap
        assert high.cost_micro_usd <= low.cost_micro_usd + max(slack, 1e-3)
        assert high.quality <= low.quality + 1e-6 * max(one, other) * max(slack, 1e-3) + 1e-6


@given(pools(), st.floats(0.0, 1e4))
def test_one_stage_is_plain_routing(
    pool: tuple[PerQuery, list[Candidate], Limits], price: float
) -> None:
    rule, candidates, limits = pool
    limits = Limits(1, 10**9, 1e9, limits.worst_micro_usd)
    choice, terms = chosen(rule.at_price(price), candidates, limits)
    assert choice is not None
    assert choice.experts == (terms[0].expert,)
    assert math.isclose(choice.value, max(term.value for term in terms))


@settings(max_examples=25, deadline=None)
@given(unit, unit, st.floats(0.05, 0.4), st.floats(0.0, 200.0))
def test_a_pair_is_worth_what_its_threshold_cascade_earns(
    first: float, second: float, spread: float, price: float
) -> None:
    """Monte Carlo: accept at the threshold, else pay for the second, over the draft's answers."""
    rule = PerQuery(price, 0.0, 1, {"general": {"a": first, "b": second}}, {"a": spread})
    specs = [
        ExpertSpec(name, SourceKind.SCRIPTED, "echo", Price(0, cost * 1_000_000), 4096, SKILLS)
        for name, cost in (("a", 100), ("b", 2_000))
    ]
    candidates = [Candidate(spec) for spec in specs]
    limits = Limits(2, 10**9, 1e9, {"a": 100, "b": 2_000})
    choice, terms = chosen(rule, candidates, limits)
    value = {term.expert: term.value for term in terms}
    quantiles = (np.arange(20_000) + 0.5) / 20_000
    says = first + spread * norm.ppf(quantiles)
    earned = np.where(says >= value["b"], says, value["b"]).mean() - price * 1e-4
    assert choice.value >= earned - 1e-3
    if choice.experts == ("a", "b"):
        assert math.isclose(choice.value, earned, abs_tol=1e-3)
