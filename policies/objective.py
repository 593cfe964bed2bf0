"""Which expert, or which draft before it, is worth most for one query. Pure.

An expert's value is its estimated quality, less what its money and its expected wait (queue and
swap, from live state) are worth: q - price_per_usd · USD - price_per_s · s. That makes residency a
term like any other: an expert that must first be swapped in has to be better by the swap's worth.

A draft d before m is cascade routing with one answer looked ahead (Dekoninck et al., 2410.10347):
d's answer will move its estimate, by ``confidence_sd`` in standard deviation; afterwards the better
of d's answer and of going on to m counts, what was spent being sunk. With X ~ N(q_d, sd²) and v_m
the value of m, the draft is worth E[max(X, v_m)] less d's own price, in closed form (Clark, "The
greatest of a finite set of random variables", 1961), and d's answer is accepted from a confidence
of v_m on. Without drafts this is plain routing; a pair with a fixed v_m is the threshold cascade.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from policies.types import Candidate, ExpertTerms, PerQuery

__all__ = ["Choice", "Limits", "choose", "expert_terms", "price_for_budget"]

_TIE = 1e-9
_MICRO = 1e-6
_PRICE_MAX = 1e9
_BISECTIONS = 60


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may use at most, worst case; ``worst_micro_usd`` by expert."""

    stages: int
    cost_micro_usd: int
    deadline_ms: float
    worst_micro_usd: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Choice:
    """The experts to run in order, and from which confidence the first one's draft is accepted.

    ``quality`` and ``cost_micro_usd`` are what is expected of it all: the second expert counts with
    the probability that it comes to it.
    """

    experts: tuple[str, ...]
    accept_from: float | None
    value: float
    quality: float
    cost_micro_usd: float


def expert_terms(
    rule: PerQuery,
    category: str,
    candidates: Sequence[Candidate],
    *,
    prompt_tokens: int,
    output_tokens_max: int,
    estimates: Mapping[str, float] | None = None,
) -> tuple[ExpertTerms, ...]:
    """The terms of every candidate with an estimate, best value first.

    ``estimates`` are the router's for this very query; where it has none, the category's row of the
    policy's table counts, or the row of ``general`` for a category without one.
    """
    table = rule.quality.get(category) or rule.quality["general"]
    known = {**table, **(estimates or {})}
    output_tokens = min(rule.output_tokens_expected, output_tokens_max)
    terms = []
    for candidate in candidates:
        name = candidate.spec.id
        if name not in known or name not in rule.experts:
            continue
        cost = candidate.spec.price.cost_micro_usd(prompt_tokens, output_tokens)
        money = rule.quality_per_usd * cost * _MICRO
        latency = rule.quality_per_s * candidate.expected_wait_ms / 1000.0
        terms.append(
            ExpertTerms(
                expert=name,
                quality=known[name],
                cost_micro_usd=cost,
                expected_wait_ms=candidate.expected_wait_ms,
                resident=candidate.resident,
                money_term=money,
                latency_term=latency,
                value=known[name] - money - latency,
                from_router=estimates is not None and name in estimates,
            )
        )
    return tuple(sorted(terms, key=lambda term: (-term.value, term.cost_micro_usd, term.expert)))


def choose(
    rule: PerQuery, terms: Sequence[ExpertTerms], judgeable: Mapping[str, bool], limits: Limits
) -> Choice | None:
    """The best single expert, or draft and expert, within the limits; None if nothing fits.

    ``judgeable``: whose answers come with log-probabilities and a calibration. Ties go to one
    expert over two, then to the order of ``terms``.
    """
    options = [*_singles(terms, limits), *_pairs(rule, terms, judgeable, limits)]
    best: Choice | None = None
    for option in options:
        if best is None or option.value > best.value + _TIE:
            best = option
    return best


def _singles(terms: Sequence[ExpertTerms], limits: Limits) -> Iterator[Choice]:
    for term in terms:
        if _fits((term,), limits):
            yield Choice((term.expert,), None, term.value, term.quality, float(term.cost_micro_usd))


def _pairs(
    rule: PerQuery, terms: Sequence[ExpertTerms], judgeable: Mapping[str, bool], limits: Limits
) -> Iterator[Choice]:
    for draft in terms:
        spread = rule.confidence_sd.get(draft.expert, 0.0)
        if spread <= 0.0 or not judgeable.get(draft.expert, False):
            continue
        for final in terms:
            if final.expert != draft.expert and _fits((draft, final), limits):
                yield _pair(draft, final, spread)


def _pair(draft: ExpertTerms, final: ExpertTerms, spread: float) -> Choice:
    """Draft first: expectations over what its answer will say of itself."""
    gap = (draft.quality - final.value) / spread
    kept, density = _cdf(gap), math.exp(-gap * gap / 2.0) / math.sqrt(2.0 * math.pi)
    draft_part = draft.quality * kept + spread * density
    best_of_both = draft_part + final.value * (1.0 - kept)
    return Choice(
        experts=(draft.expert, final.expert),
        accept_from=min(1.0, max(0.0, final.value)),
        value=best_of_both - draft.money_term - draft.latency_term,
        quality=draft_part + final.quality * (1.0 - kept),
        cost_micro_usd=draft.cost_micro_usd + (1.0 - kept) * final.cost_micro_usd,
    )


def _fits(terms: Sequence[ExpertTerms], limits: Limits) -> bool:
    worst = sum(limits.worst_micro_usd[term.expert] for term in terms)
    wait = sum(term.expected_wait_ms for term in terms)
    return (
        len(terms) <= limits.stages and worst <= limits.cost_micro_usd and wait < limits.deadline_ms
    )


def _cdf(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2.0))


def price_for_budget(
    rule: PerQuery,
    candidates: Sequence[Candidate],
    shares: Mapping[str, float],
    judgeable: Mapping[str, bool],
    limits: Limits,
    *,
    prompt_tokens: int,
    budget_micro_usd: float,
) -> tuple[PerQuery, float, float]:
    """The least price of money at which the policy's tables keep to a mean cost per request.

    ``shares``: how much of the traffic each category is. Returns the rule with that
    ``quality_per_usd``, the expected cost in micro-USD and the expected quality. By bisection: a
    higher price never costs more. Raises ValueError when the budget is below the cheapest choice.
    """

    def expected(price: float) -> tuple[float, float]:
        priced = rule.at_price(price)
        cost = quality = 0.0
        for category, share in shares.items():
            terms = expert_terms(
                priced,
                category,
                candidates,
                prompt_tokens=prompt_tokens,
                output_tokens_max=rule.output_tokens_expected,
            )
            choice = choose(priced, terms, judgeable, limits)
            if choice is None:
                raise ValueError(f"no expert fits the caps for {category!r}")
            cost += share * choice.cost_micro_usd
            quality += share * choice.quality
        total = sum(shares.values())
        return cost / total, quality / total

    if expected(0.0)[0] <= budget_micro_usd:
        return (rule.at_price(0.0), *expected(0.0))
    low, high = 0.0, _PRICE_MAX
    if expected(high)[0] > budget_micro_usd:
        least = expected(high)[0]
        raise ValueError(f"the cheapest choice costs {least:.1f} micro-USD per request")
    for _ in range(_BISECTIONS):
        middle = math.sqrt(max(low, 1e-6) * high)
        low, high = (middle, high) if expected(middle)[0] > budget_micro_usd else (low, middle)
    return (rule.at_price(high), *expected(high))
