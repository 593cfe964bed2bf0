"""Signals of an answer beside its own log-probabilities: entropy of alternatives, agreement."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.agreement import agreement_with, final_result, pair_agreement
from policies.answer_features import ENTROPY_TOP, entropy_features, truncated_entropy

any_logprob = st.floats(allow_nan=True, allow_infinity=True)
shares = st.lists(st.floats(1e-6, 1.0), min_size=ENTROPY_TOP, max_size=30)
some_word = st.sampled_from(["river", "stone", "seven", "7", "1,000", "Paris", "the", "of"])
words = st.lists(some_word, max_size=12)
texts = st.one_of(st.text(max_size=80), words.map(" ".join))


@given(st.lists(any_logprob, max_size=25))
def test_any_list_of_alternatives_has_an_entropy_within_bounds_or_none(top: list[float]) -> None:
    entropy = truncated_entropy(top)
    if sum(not math.isnan(value) for value in top) < ENTROPY_TOP:
        assert entropy is None
    if entropy is not None:
        assert 0.0 <= entropy <= math.log(ENTROPY_TOP + 1) + 1e-9


@given(shares, st.randoms(use_true_random=False))
def test_entropy_is_a_lower_bound_that_needs_no_order(weights: list[float], random: object) -> None:
    total = sum(weights)
    top = [math.log(weight / total) for weight in weights]
    whole = -sum(math.exp(value) * value for value in top)
    found = truncated_entropy(top)
    assert found is not None
    assert found <= whole + 1e-9
    shuffled = list(top)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert truncated_entropy(shuffled) == pytest.approx(found)
    assert truncated_entropy(sorted(top)[-ENTROPY_TOP:]) == pytest.approx(found), "five are read"


@given(st.lists(st.floats(0.0, 1.8), min_size=1, max_size=50))
def test_entropy_features_lie_between_the_least_and_the_most(entropies: list[float]) -> None:
    found = entropy_features(entropies)
    assert found.maximum == max(entropies)
    for value in found.values():
        assert min(entropies) - 1e-9 <= value <= max(entropies) + 1e-9


@given(texts, texts)
def test_agreement_is_symmetric_and_between_0_and_1(one: str, other: str) -> None:
    found = pair_agreement(one, other)
    assert 0.0 <= found <= 1.0
    assert found == pair_agreement(other, one)


@given(words.filter(bool))
def test_an_answer_agrees_with_itself_whatever_its_case_and_spaces(answer: list[str]) -> None:
    plain, loud = " ".join(answer), "  ".join(answer).upper() + " !\n"
    assert pair_agreement(plain, loud) == 1.0
    assert agreement_with(plain, [loud, loud]) == 1.0
    assert agreement_with(plain, []) is None


@pytest.mark.parametrize(
    ("one", "other", "agreement"),
    [
        ("12 + 30 gives\n#### 1,042", "So the answer is 1042.0 metres.", 1.0),
        ("... The answer is B.", "B", 1.0),
        ("Answer: -3", "the answer is 3", 0.0),
        (r"so \boxed{x = 2}", "The answer is: x = 2", 1.0),
        (r"so \boxed{x = 2}", "The answer is: x = 3", 1 / 3),
        ("Answering this is easy. " * 3, "This was said here and not altogether", 0.1),
        ("", "", 0.0),
    ],
)
def test_results_are_compared_where_both_name_one(one: str, other: str, agreement: float) -> None:
    assert pair_agreement(one, other) == pytest.approx(agreement)


def test_the_last_result_counts_and_prose_names_none() -> None:
    assert final_result("first the answer is 3, no: the answer is 4\nAnswer: 5") == "5"
    assert final_result("The tower is in Paris, which is a city in France.") is None
