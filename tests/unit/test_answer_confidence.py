"""From token log-probabilities to a verdict: one function for fitting and for serving."""

from __future__ import annotations

import math
from dataclasses import asdict, astuple
from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from experts.errors import ConfigError
from gateway.choice_logprobs import ChoiceLogprobs
from policies.answer_features import answer_features
from policies.calibration_fit import fit_calibration
from policies.cascade import Cascade
from policies.loader import dump_policy, load_policy
from policies.types import (
    AcceptanceRule,
    Calibration,
    Caps,
    Evidence,
    Plan,
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


def answers(count: int, seed: int) -> tuple[list[list[float]], list[bool]]:
    """Answers whose one doubtful token, not their mean, says whether they are right."""
    rng = np.random.default_rng(seed)
    right = rng.random(count) < 0.5
    tokens = -rng.exponential(0.3, (count, 30))
    tokens[np.arange(count), rng.integers(0, 30, count)] -= np.where(right, 0.0, 1.5)
    return tokens.tolist(), right.tolist()


def told_by(fit: Calibration, tokens: list[float]) -> float:
    confidence = fit.confidence(evidence(tuple(tokens)))
    assert confidence is not None
    return confidence


def test_a_fit_on_all_features_ranks_better_than_the_mean_and_serves_as_fitted() -> None:
    fitted_on, (seen, truth) = answers(300, 0), answers(600, 1)
    auroc = {}
    for mean_only in (True, False):
        fit = fit_calibration(*fitted_on, mean_only=mean_only)
        told = [told_by(fit, tokens) for tokens in seen]
        auroc[mean_only] = roc_auc_score(truth, told)
        trained = [told_by(fit, tokens) for tokens in fitted_on[0]]
        assert np.mean(trained) == pytest.approx(np.mean(fitted_on[1]), abs=1e-3)
        assert min(fit.slope, *fit.further_weights) >= 0
    assert auroc[False] > auroc[True] + 0.05
    with pytest.raises(ValueError, match="right and wrong"):
        fit_calibration([[-0.1]], [True])


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


def test_a_policy_file_carries_the_weights_and_refuses_negative_ones(tmp_path: Path) -> None:
    content = {
        "version": 1,
        "default": ["a", "b"],
        "cascade": {"calibration": {"a": {"slope": 1.0, "intercept": 0.5, "quantile_10": 2.0}}},
        "caps": {"cost_usd": 0.01},
    }
    file = tmp_path / "p.yaml"
    file.write_text(yaml.safe_dump(content))
    policy = load_policy(file, {"a", "b"})
    assert asdict(policy.calibrations["a"])["quantile_10"] == 2.0
    again = tmp_path / "again.yaml"
    again.write_text(dump_policy(policy))
    assert load_policy(again, {"a", "b"}).digest == policy.digest
    content["cascade"]["calibration"]["a"]["quantile_10"] = -1.0  # type: ignore[index]
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="quantile_10"):
        load_policy(file, {"a", "b"})
