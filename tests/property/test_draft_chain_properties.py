"""Chains of drafts under correlated errors, against playing them out."""

from __future__ import annotations

from itertools import permutations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from policies.draft_chains import Option, options, single
from policies.types import AcceptanceRule, Calibration, ExpertTerms, PerQuery

NAMES = ("a", "b", "c", "d")
unit = st.floats(0.02, 0.98)
JUDGEABLE = dict.fromkeys(NAMES, True)
DRAWS = norm.ppf((np.arange(20_000) + 0.5) / 20_000)


def term(name: str, quality: float, price: float) -> ExpertTerms:
    return ExpertTerms(name, quality, 1, 0.0, True, price, 0.0, quality - price, False)


@st.composite
def pools(draw: st.DrawFn, size: int = 4) -> tuple[PerQuery, list[ExpertTerms]]:
    names = NAMES[: draw(st.integers(1, size))]
    spread = {name: draw(st.sampled_from([0.0, 0.05, 0.2, 0.3])) for name in names}
    moves = {
        one: {other: draw(st.floats(-0.1, 0.25)) for other in names if other != one}
        for one in names
    }
    rule = PerQuery(0.0, 0.0, 1, {"general": {}}, spread, moves)
    terms = [term(name, draw(unit), draw(st.floats(0.0, 0.3))) for name in names]
    return rule, sorted(terms, key=lambda one: -one.value)


def found(rule: PerQuery, terms: list[ExpertTerms], stages: int) -> list[Option]:
    return list(options(rule, terms, JUDGEABLE, lambda _: True, stages_max=stages))


def best(options_found: list[Option]) -> Option:
    return max(options_found, key=lambda option: option.value)


@settings(max_examples=60, deadline=None)
@given(pools(2))
def test_a_pair_earns_its_value_when_it_is_played_with_correlated_news(
    pool: tuple[PerQuery, list[ExpertTerms]],
) -> None:
    rule, terms = pool
    by_name = {one.expert: one for one in terms}
    for option in found(rule, terms, 2):
        if len(option.experts) == 1:
            continue
        draft, final = (by_name[name] for name in option.experts)
        own, other = (rule.moves(draft.expert, one.expert) for one in (draft, final))
        says = draft.quality + own * DRAWS
        threshold = option.thresholds[0].accept_from
        if not 0.0 < threshold < 1.0:
            continue  # a bound at the end of the scale
        kept = says >= threshold
        follows = final.value + other * DRAWS
        earned = np.where(kept, says, follows).mean() - draft.money_term
        assert abs(option.value - earned) < 2e-3
        assert abs(option.answers[0] - kept.mean()) < 2e-3
        quality = np.where(kept, says, final.quality + other * DRAWS).mean()
        assert abs(option.quality - quality) < 2e-3


@settings(max_examples=40, deadline=None)
@given(pools(3))
def test_more_stages_never_promise_less_and_no_expert_runs_twice(
    pool: tuple[PerQuery, list[ExpertTerms]],
) -> None:
    rule, terms = pool
    values = [best(found(rule, terms, stages)).value for stages in (1, 2, 3)]
    assert values == sorted(values)
    for option in found(rule, terms, 3):
        assert len(set(option.experts)) == len(option.experts) == len(option.thresholds) + 1
        assert abs(sum(option.answers) - 1.0) < 1e-9
        assert all(0.0 <= one.accept_from <= 1.0 for one in option.thresholds)
        assert option.value >= single(option.terms[-1]).value - sum(
            one.money_term for one in option.terms[:-1]
        ), "whoever may go on is never worth less than going on blindly"


@settings(max_examples=40, deadline=None)
@given(pools(4))
def test_the_search_finds_what_all_chains_hold(pool: tuple[PerQuery, list[ExpertTerms]]) -> None:
    """Every order of drafts, each built alone, from the last expert back."""
    rule, terms = pool
    by_name = {one.expert: one for one in terms}
    everything: list[float] = []
    for length in (1, 2, 3):
        for names in permutations(by_name, min(length, len(by_name))):
            only = [by_name[name] for name in names]
            alone = [o.value for o in found(rule, only, length) if o.experts == names]
            everything += alone
    missed = max(everything) - best(found(rule, terms, 3)).value
    assert -1e-12 < missed < (1e-12 if len(terms) <= 3 else 0.02), "eight options are kept"


@settings(max_examples=60, deadline=None)
@given(st.floats(0.05, 0.3), st.floats(0.0, 0.9), unit, unit, unit, st.floats(0.0, 1.0))
def test_a_later_bound_follows_what_the_first_answer_said(
    spread: float, share: float, first: float, second: float, last: float, says: float
) -> None:
    """As if the pair were planned anew with the estimates that the first answer leaves."""
    common = share * spread
    moves = {"a": {"b": common, "c": 0.5 * common}, "b": {"c": 0.3 * common}}
    rule = PerQuery(0.0, 0.0, 1, {"general": {}}, {"a": spread, "b": spread}, moves)
    qualities = {"a": first, "b": second, "c": last}

    def pair(b: float, c: float) -> Option:
        chosen = [term("b", b, 0.0), term("c", c, 0.0)]
        return next(o for o in found(rule, chosen, 2) if o.experts == ("b", "c"))

    terms = [term(name, quality, 0.0) for name, quality in qualities.items()]
    chain = next(o for o in found(rule, terms, 3) if o.experts == ("a", "b", "c"))
    news = (says - first) / spread
    anew = pair(second + common * news, last + 0.5 * common * news).thresholds[0].accept_from
    planned = chain.thresholds[1]
    if not 0.0 < planned.accept_from < 1.0:
        return  # cut off at the end of the scale, so no longer a line
    rule_of_b = AcceptanceRule(planned.accept_from, Calibration(1.0, 0.0), planned.following)
    assert abs(rule_of_b.bound(says) - anew) < 1e-9
    assert rule_of_b.bound(None) == planned.accept_from
    assert abs(rule_of_b.bound(first) - planned.accept_from) < 1e-12


def test_a_draft_that_only_says_what_all_fail_on_never_pays() -> None:
    rule = PerQuery(0.0, 0.0, 1, {"general": {}}, {"a": 0.2}, {"a": {"b": 0.2}})
    terms = [term("b", 0.7, 0.1), term("a", 0.5, 0.0)]
    assert [option.experts for option in found(rule, terms, 2)] == [("b",), ("a",)]
