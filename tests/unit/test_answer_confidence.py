"""From token log-probabilities to a verdict: one function for fitting and for serving."""

from __future__ import annotations

import math
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from experts.errors import ConfigError
from gateway.choice_logprobs import ChoiceLogprobs
from policies.answer_features import answer_features
from policies.calibration import EntropyWeights, OneWeight
from policies.calibration_fit import GROUPS, fit_calibration
from policies.cascade import Cascade
from policies.loader import dump_policy, load_policy
from policies.types import (
    AcceptanceRule,
    Calibration,
    Caps,
    Evidence,
    Plan,
    Policy,
    Stage,
    StreamWindow,
    Verdict,
)

STEADY = (-0.1,) * 20
DOUBTFUL = (0.0,) * 19 + (-2.0,)  # the same mean


def evidence(tokens: tuple[float, ...]) -> Evidence:
    return Evidence(sum(tokens), len(tokens), finished=True, elapsed_ms=0.0, logprobs=tokens)


def test_features_are_numpys_quantiles_within_bounds() -> None:
    tokens = [-0.3, -math.inf, -1.1, 0.4, -0.2]
    found = answer_features(tokens)
    clipped = np.clip(tokens, -20.0, 0.0)
    expected = [clipped.mean(), clipped.min(), clipped[0], *np.quantile(clipped, [0.1, 0.25, 0.5])]
    assert astuple(found) == pytest.approx(expected)
    with pytest.raises(ValueError, match="without log-probabilities"):
        answer_features([])


def answers(count: int, seed: int) -> tuple[list[Evidence], list[bool]]:
    """Answers whose one doubtful token, not their mean, says whether they are right."""
    rng = np.random.default_rng(seed)
    right = rng.random(count) < 0.5
    tokens = -rng.exponential(0.3, (count, 30))
    tokens[np.arange(count), rng.integers(0, 30, count)] -= np.where(right, 0.0, 1.5)
    return [evidence(tuple(row)) for row in tokens.tolist()], right.tolist()


def told_by(fit: Calibration, answer: Evidence) -> float:
    confidence = fit.confidence(answer)
    assert confidence is not None
    return confidence


def test_a_fit_on_all_features_ranks_better_than_the_mean_and_serves_as_fitted() -> None:
    fitted_on, (seen, truth) = answers(300, 0), answers(600, 1)
    auroc = {}
    for groups in ((), GROUPS):
        fit = fit_calibration(*fitted_on, groups=groups)
        told = [told_by(fit, answer) for answer in seen]
        auroc[groups] = roc_auc_score(truth, told)
        trained = [told_by(fit, answer) for answer in fitted_on[0]]
        assert np.mean(trained) == pytest.approx(np.mean(fitted_on[1]), abs=1e-3)
        assert min(fit.slope, *fit.further_weights) >= 0
        assert fit.entropy is None, "no answer had any"
    assert auroc[GROUPS] > auroc[()] + 0.05
    with pytest.raises(ValueError, match="right and wrong"):
        fit_calibration([evidence(STEADY)], [True])


def with_opinions(count: int, seed: int, *, known: float) -> tuple[list[Evidence], list[bool]]:
    """Tokens say nothing, entropy and agreement do; ``known``: the share that has them."""
    rng = np.random.default_rng(seed)
    right = rng.random(count) < 0.6
    found = []
    for good in right:
        entropies = tuple(rng.gamma(2.0, 0.2 if good else 0.4, 20).tolist())
        agreement = float(rng.random() < (0.8 if good else 0.3))
        has = rng.random(2) < known
        found.append(
            replace(
                evidence(STEADY),
                entropies=entropies if has[0] else (),
                agreement=agreement if has[1] else None,
            )
        )
    return found, right.tolist()


@pytest.mark.parametrize("known", [1.0, 0.6])
def test_answers_without_a_feature_are_told_with_calibrated_confidence(known: float) -> None:
    seen, truth = with_opinions(800, 0, known=known)
    fit = fit_calibration(seen, truth)
    assert fit.entropy is not None
    assert fit.agreement is not None
    assert max(fit.entropy.mean, fit.entropy.maximum, fit.entropy.quantile_90) <= 0
    assert fit.agreement.weight > 1
    others, right = with_opinions(800, 1, known=1.0)
    assert roc_auc_score(right, [told_by(fit, answer) for answer in others]) > 0.85
    bare = [replace(answer, entropies=(), agreement=None) for answer in others]
    told = [told_by(fit, answer) for answer in bare]
    assert np.mean(told) == pytest.approx(np.mean(right), abs=0.08)
    assert np.std(told) < 0.05, "tokens alone say nothing here"


def test_doubt_tells_apart_what_is_nearly_certain() -> None:
    rng = np.random.default_rng(0)
    left = 10.0 ** rng.uniform(-6, -1, 600)
    right = rng.random(600) < np.where(left < 1e-3, 0.9, 0.4)
    seen = [evidence((math.log1p(-share),)) for share in left]
    truth = np.where(left < 1e-3, 0.9, 0.4)
    by_mean, fit = (fit_calibration(seen, right, groups=groups) for groups in ((), ("doubt",)))
    errors = [
        np.abs(np.array([told_by(one, a) for a in seen]) - truth).mean() for one in (by_mean, fit)
    ]
    assert errors[1] < 0.7 * errors[0]
    assert fit.doubt < 0
    assert told_by(fit, evidence((0.0,))) > told_by(fit, evidence((-1e-4,)))


def test_a_category_moves_the_intercept_the_less_the_fewer_its_answers() -> None:
    seen, _ = answers(460, 3)
    categories = ["hard"] * 200 + ["easy"] * 250 + ["rare"] * 10
    right = [n % 4 == 0 for n in range(200)] + [n % 4 > 0 for n in range(250)] + [False] * 10
    fit = fit_calibration(seen, right, groups=(), categories=categories)
    assert fit.by_category["hard"] < -0.5 < 0.5 < fit.by_category["easy"]
    assert fit.by_category["hard"] < fit.by_category["rare"] < 0, "all wrong, but only ten"
    hard = fit.for_category("hard")
    assert np.mean([told_by(hard, one) for one in seen[:200]]) == pytest.approx(0.25, abs=0.03)
    assert fit.for_category("unheard of") is fit


def test_an_answer_that_has_not_ended_is_judged_by_its_own_calibration() -> None:
    prefix = Calibration(1.0, -3.0, by_category={"math": 1.0})
    fit = Calibration(1.0, 3.0, prefix=prefix, length=OneWeight(-1.0, missing=-2.0))
    begun = replace(evidence(STEADY), finished=False)
    assert told_by(fit, begun) == pytest.approx(1 / (1 + math.exp(3.1)))
    assert told_by(fit.for_category("math"), begun) == pytest.approx(1 / (1 + math.exp(2.1)))
    whole = 1 / (1 + math.exp(-(2.9 - math.log(20))))
    assert told_by(fit, evidence(STEADY)) == pytest.approx(whole)
    without_prefix = replace(fit, prefix=None)
    assert told_by(without_prefix, begun) == pytest.approx(1 / (1 + math.exp(-0.9)))


@pytest.mark.parametrize(("tokens", "verdict"), [(STEADY, "accept"), (DOUBTFUL, "escalate")])
def test_a_cascade_reads_the_tokens_that_the_gateway_collects(
    tokens: tuple[float, ...], verdict: str
) -> None:
    rule = AcceptanceRule(0.6, Calibration(slope=1.0, intercept=2.0, minimum=1.5))
    stages = (Stage("draft", rule), Stage("final"))
    plan = Plan("p", "d", "c", stages, Caps(2, 10, 1e3), StreamWindow(8, 1e3), (1, 1))
    cascade = Cascade(plan, 0.0)
    cascade.next_attempt(0.0)
    collected = ChoiceLogprobs()
    for value in tokens:
        collected.add({"choices": [{"logprobs": {"content": [{"logprob": value}]}}]})
    judged = cascade.judge(collected.evidence(finished=True, elapsed_ms=0.0))
    assert judged is Verdict(verdict)


def test_of_several_choices_the_weakest_ones_tokens_count() -> None:
    body = {
        "choices": [
            {"index": 0, "logprobs": {"content": [{"logprob": -0.1}] * 3}},
            {"index": 1, "logprobs": {"content": [{"logprob": -2.0}, {"logprob": -1.0}]}},
        ]
    }
    collected = ChoiceLogprobs(choices=2)
    collected.add(body)
    assert collected.evidence(finished=True, elapsed_ms=0.0).logprobs == (-2.0, -1.0)


def test_weights_without_tokens_are_no_confidence() -> None:
    summed = Evidence(-2.0, 20, finished=True, elapsed_ms=0.0)
    assert Calibration(1.0, 2.0).confidence(summed) == pytest.approx(1 / (1 + math.exp(-1.9)))
    assert Calibration(1.0, 2.0, first=1.0).confidence(summed) is None


def alternatives(count: int) -> dict[str, object]:
    top = [{"token": str(n), "logprob": math.log(0.5 / 2**n)} for n in range(count)]
    return {"token": "0", "logprob": math.log(0.5), "top_logprobs": top}


@pytest.mark.parametrize(("counts", "known"), [((5, 20), 2), ((5, 4), 0), ((0, 0), 0)])
def test_entropy_counts_only_where_every_token_has_enough_alternatives(
    counts: tuple[int, ...], known: int
) -> None:
    chat = {"content": [alternatives(count) for count in counts]}
    tops = [{a["token"]: a["logprob"] for a in one["top_logprobs"]} for one in chat["content"]]  # type: ignore[attr-defined]
    text = {"token_logprobs": [math.log(0.5)] * 2, "top_logprobs": [*tops]}
    shares = [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]  # five of them, and the rest
    entropy = -sum(share * math.log(share) for share in shares)
    for logprobs in (chat, text):
        collected = ChoiceLogprobs()
        collected.add({"choices": [{"logprobs": logprobs}]})
        found = collected.evidence(finished=True, elapsed_ms=0.0)
        assert found.logprobs == (math.log(0.5),) * 2
        assert found.entropies == pytest.approx((entropy,) * known)


def test_whole_answers_are_held_against_earlier_ones() -> None:
    collected = ChoiceLogprobs()
    for piece in ("The answer", " is 42."):
        delta = {"delta": {"content": piece}, "logprobs": {"content": [{"logprob": -0.1}]}}
        collected.add({"choices": [delta]})
    earlier = ["so #### 42", "I think the answer is: 41"]
    assert collected.evidence(finished=True, elapsed_ms=0.0, earlier=earlier).agreement == 0.5
    assert collected.evidence(finished=False, elapsed_ms=0.0, earlier=earlier).agreement is None
    assert collected.evidence(finished=True, elapsed_ms=0.0).agreement is None


FULL = {
    "slope": 1.0,
    "intercept": 0.5,
    "quantile_10": 2.0,
    "doubt": -0.25,
    "entropy": {"maximum": -0.5, "missing": -0.75},
    "length": {"weight": -0.25, "missing": -1.0},
    "agreement": {"weight": 2.0},
    "by_category": {"math": -1.5},
    "prefix": {"slope": 2.0, "intercept": 0.0, "entropy": {"mean": -1.0}},
}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quantile_10": -1.0}, "quantile_10"),
        ({"entropy": {"mean": 0.5}}, "entropy.mean"),
        ({"agreement": {"weight": -2.0}}, "agreement.weight"),
        ({"prefix": {"slope": 1.0, "intercept": 0.0, "length": {"weight": 1.0}}}, "length"),
    ],
)
def test_a_policy_file_carries_the_weights_and_refuses_wrong_signs(
    tmp_path: Path, change: dict[str, object], says: str
) -> None:
    file, again = tmp_path / "p.yaml", tmp_path / "again.yaml"

    def loaded(fit: dict[str, object]) -> Policy:
        content = {
            "version": 1,
            "default": ["a", "b"],
            "cascade": {"calibration": {"a": fit}},
            "caps": {"cost_usd": 0.01},
        }
        file.write_text(yaml.safe_dump(content))
        return load_policy(file, {"a", "b"})

    policy = loaded(FULL)
    fit = policy.calibrations["a"]
    assert fit.entropy == EntropyWeights(maximum=-0.5, missing=-0.75)
    assert fit.reads_entropy
    assert fit.by_category == {"math": -1.5}
    assert fit.prefix == Calibration(2.0, 0.0, entropy=EntropyWeights(mean=-1.0))
    again.write_text(dump_policy(policy))
    assert load_policy(again, {"a", "b"}) == replace(policy, name="again")
    with pytest.raises(ConfigError, match=says):
        loaded({**FULL, **change})
