"""Cascade routing against its special cases, and on planted data."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import norm

from gateway.evaluation.cascade import CascadeData, evaluate_cascade
from gateway.evaluation.cascade_replay import Estimates, Recorded, prices_of, replay
from gateway.evaluation.cascade_stages import stages_by_category
from gateway.evaluation.threshold_cascade import Chain
from policies.cascade_routing import STOP, Search, next_experts
from policies.full_search import expected_best
from policies.joint_estimates import JointEstimates, fit_joint_estimates
from policies.post_answer import confidence_features, fit_post_answer

RNG = np.random.default_rng(7)
N = 200
TYPICAL = np.array([0.5, 2.5, 8.5])
HARDEST = np.array([0.4, 0.2, 0.0])  # the ease at which each planted expert begins to fail


def estimates(joint: JointEstimates, prior: np.ndarray, after: np.ndarray) -> Estimates:
    cost = np.tile([1.0, 3.0, 9.0], (len(prior), 1))
    return Estimates(prior, after, cost, {"all": joint}, ["all"] * len(prior))


def recorded(n: int = N) -> Recorded:
    return Recorded((RNG.random((n, 3)) < 0.5).astype(float), RNG.random((n, 3)) + TYPICAL)


def joint_of(effect: list[float]) -> JointEstimates:
    spread = np.full(3, 0.25)
    return JointEstimates(np.diag(effect), np.diag(np.maximum(effect, 1e-3)), spread)


@pytest.mark.parametrize("search", ["greedy", "full"])
@pytest.mark.parametrize("price", [0.0, 0.02, 0.1])
def test_one_stage_is_plain_routing(search: Search, price: float) -> None:
    quality, cost = RNG.random((N, 3)), RNG.random((N, 3))
    chosen = next_experts(
        joint_of([0.1, 0.1, 0.1]), (), quality, cost, price, stages_left=1, search=search
    )
    assert np.array_equal(chosen, (quality - price * cost).argmax(axis=1))


def test_a_chain_whose_answers_tell_of_themselves_is_the_threshold_cascade() -> None:
    """Only the first expert's answer tells anything, and of that expert alone."""
    answers = recorded()
    prior, after = np.tile([0.5, 0.7, 0.0], (N, 1)), RNG.random((N, 3))
    exact = JointEstimates(np.diag([1.05, 0.0, 0.0]), np.diag([1.0, 1e-6, 1e-6]), np.full(3, 0.25))
    price = 0.05
    ours = replay(answers, estimates(exact, prior, after), price, stages_max=2)
    started = ours.stages >= 1
    first = next_experts(
        exact, (), prior, estimates(exact, prior, after).cost, price, stages_left=2
    )
    assert started.all()
    assert set(first.tolist()) == {0}
    costs = np.clip(answers.cost[:, :1], 0.25, 4.0) * 3.0  # as dear as the first answer proved
    score, paid = np.empty(N), np.empty(N)
    for row in range(N):
        chain = Chain((0, 1), (0.7 - price * float(costs[row, 0]),))
        one = Recorded(answers.score[row : row + 1], answers.cost[row : row + 1])
        [score[row]], [paid[row]] = chain.run(one, after[row : row + 1])
    assert 0 < (ours.stages == 2).sum() < N
    assert np.allclose(ours.score, score)
    assert np.allclose(ours.cost, paid)


def test_what_is_spent_is_sunk_and_every_stage_is_paid() -> None:
    answers = recorded()
    prior, after = np.tile([0.4, 0.5, 0.6], (N, 1)), RNG.random((N, 3))
    joint = joint_of([0.05, 0.05, 0.05])
    run = replay(answers, estimates(joint, prior, after), 1e-4, stages_max=3)
    assert (run.stages > 1).any()
    assert (run.cost >= answers.cost.min(axis=1)).all()
    everything = run.stages == 3
    assert np.allclose(run.cost[everything], answers.cost.sum(axis=1)[everything])


def test_expected_best_of_two_is_clarks_closed_form() -> None:
    mean, covariance = np.array([[0.4, 0.55]]), np.array([[0.04, 0.01], [0.01, 0.09]])
    theta = math.sqrt(0.04 + 0.09 - 0.02)
    a = (0.4 - 0.55) / theta
    exact = 0.4 * norm.cdf(a) + 0.55 * norm.cdf(-a) + theta * norm.pdf(a)
    assert expected_best(mean, covariance)[0] == pytest.approx(exact, abs=5e-3)


def test_full_search_is_deterministic_by_seed() -> None:
    quality, cost = RNG.random((N, 3)), RNG.random((N, 3))
    joint = joint_of([0.1, 0.1, 0.1])
    once, again = (
        next_experts(joint, (0,), quality, cost, 0.2, stages_left=2, search="full", seed=3)
        for _ in range(2)
    )
    assert np.array_equal(once, again)
    assert STOP in once


def test_joint_estimates_learn_what_one_answer_says_of_another() -> None:
    """Two experts fail on the same hard queries: a doubtful first answer lowers both."""
    hard = RNG.random(4000) < 0.5
    score = (RNG.random((4000, 2)) < np.where(hard, 0.2, 0.9)[:, None]).astype(float)
    prior = np.full((4000, 2), 0.55)
    after = np.where(hard, 0.2, 0.9)[:, None].repeat(2, axis=1)
    joint, _ = fit_joint_estimates(prior, after, score)
    doubtful, sure = joint.quality((0,), prior[:2], np.array([[0.2, 0.0], [0.9, 0.0]]))
    assert doubtful[1] == pytest.approx(0.2, abs=0.06)
    assert sure[1] == pytest.approx(0.9, abs=0.06)
    assert joint.moves((0,), prior[:1])[0, 0].tolist() == [0.0, 0.0]  # it has answered already


def test_post_answer_estimates_are_calibrated_and_take_any_confidence() -> None:
    confidence = np.concatenate([-RNG.exponential(1.0, 3000), np.zeros(500), [-np.inf] * 20])
    truth = np.where(confidence == 0, 0.6, np.exp(np.maximum(confidence, -30)) * 0.8 + 0.1)
    score = (RNG.random(len(truth)) < truth).astype(float)
    features, prior = confidence_features(confidence), np.full(len(truth), 0.5)
    model = fit_post_answer(features, prior, score, None)
    told = model.probability(features, prior, None)
    assert np.isfinite(told).all()
    tied = confidence == 0
    assert told[tied].mean() == pytest.approx(0.6, abs=0.05)
    assert np.abs(told - truth).mean() < 0.05


def test_an_experts_rare_category_leans_on_the_others() -> None:
    features = confidence_features(-RNG.exponential(1.0, 1000))
    score = (RNG.random(1000) < 0.7).astype(float)
    categories = ["often"] * 997 + ["rare"] * 3
    score[-3:] = 0.0
    model = fit_post_answer(features, np.full(1000, 0.5), score, categories)
    rare = model.probability(features[-3:], np.full(3, 0.5), ["rare"] * 3)
    assert (rare > 0.4).all()


def test_a_category_whose_rows_count_against_drafts_is_routed_alone() -> None:
    """Both categories promise the same of an answer's confidence; in one it is drawn at random."""
    score = (RNG.random((2 * N, 3)) < [0.5, 0.6, 0.7]).astype(float)
    told = np.where(score > 0, 0.95, 0.05)
    told[N:] = RNG.permutation(told[N:])
    joint = joint_of([0.2, 0.2, 0.2])
    categories = ["tells"] * N + ["misleads"] * N
    answers = Recorded(score, np.tile([0.5, 2.5, 8.5], (2 * N, 1)))
    known = Estimates(
        np.tile([0.5, 0.6, 0.7], (2 * N, 1)),
        told,
        answers.cost,
        {"tells": joint, "misleads": joint},
        categories,
    )
    limits = stages_by_category(answers, known, 3, "greedy")
    assert limits == {"tells": 3, "misleads": 1}
    free = replay(answers, known, 1e-3, stages_max=3)
    bound = replay(answers, replace(known, stages=limits), 1e-3, stages_max=3)
    assert np.array_equal(bound.stages[:N], free.stages[:N])
    assert (bound.stages[N:] == 1).all()
    assert (free.stages[N:] > 1).any()


def test_experts_that_cost_nothing_have_prices_all_the_same() -> None:
    free = np.zeros((4, 3))
    assert np.isfinite(prices_of(free)).all()
    assert (np.diff(prices_of(free)) < 0).all()
    dear = prices_of(np.full((4, 3), 2.0))
    assert dear == pytest.approx(prices_of(free) / 2.0)


def planted(n: int, seed: int) -> CascadeData:
    """Three experts on easy and hard queries, whose confidence tells which it was."""
    rng = np.random.default_rng(seed)

    def draw(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        ease = rng.random((rows, 1))
        chance = np.clip(3.0 * (ease - HARDEST), 0.03, 0.97)
        score = (rng.random((rows, 3)) < chance).astype(float)
        seen = np.clip(chance + 0.1 * rng.standard_normal((rows, 3)), 0.01, 0.999)
        cost = rng.uniform(0.9, 1.1, (rows, 3)) * [1.0, 4.0, 20.0]
        return score, cost, np.log(seen), np.tile([0.44, 0.63, 0.82], (rows, 1))

    train, test = draw(n), draw(n)
    both = [pair for columns in zip(train, test, strict=True) for pair in columns]
    return CascadeData(("s", "m", "l"), *both, seed=seed)


def test_on_planted_data_cascade_routing_beats_what_it_generalises() -> None:
    result = evaluate_cascade(planted(400, 0)).as_json(resamples=100)
    assert result["auc"] > result["routing_alone"]["auc"] + 0.02
    assert result["auc"] > result["threshold_cascade"]["auc"] - 0.01
    assert result["ci95"]["auc_minus_routing_alone"]["low"] > 0
    costs = [point["cost"] for point in result["curve"]]
    assert all(a <= b for a, b in pairwise(costs))
    assert set(result) >= {"aiq", "best_score", "best_score_cost", "cost_at_best_single_score"}


def test_the_full_search_is_a_choice_of_its_own() -> None:
    data = planted(80, 2)
    greedy, full = (evaluate_cascade(replace(data, search=way)) for way in ("greedy", "full"))
    assert not np.array_equal(
        greedy.curves["cascade_routing"].cost, full.curves["cascade_routing"].cost
    )
    alone = full.as_json(resamples=1)
    assert alone["auc"] > alone["routing_alone"]["auc"]
    threshold = [result.curves["threshold_cascade"].score for result in (greedy, full)]
    assert np.array_equal(*threshold), "which has no search"


def test_equal_data_and_seed_give_equal_results_and_test_rows_choose_nothing() -> None:
    data = planted(150, 1)
    once = evaluate_cascade(data)
    again = evaluate_cascade(data)
    assert once.as_json(resamples=20) == again.as_json(resamples=20)
    other_labels = replace(data, score_test=1.0 - data.score_test)
    turned = evaluate_cascade(other_labels)
    for name, curve in once.curves.items():
        assert np.array_equal(curve.cost, turned.curves[name].cost)
