"""Which expert, or which draft before it, is worth most for one query. Pure.

An expert's value is its estimated quality, less what its money and its expected wait (queue and
swap, from live state) are worth: q - price_per_usd · USD - price_per_s · s. That makes residency a
term like any other: an expert that must first be swapped in has to be better by the swap's worth.

Drafts before an expert are cascade routing with fixed plans; what they are worth, and from which
confidence on they are accepted, is in ``policies.draft_chains``. Without drafts this is plain
routing; one with a fixed bound is the threshold cascade.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from policies.draft_chains import Option, options
from policies.types import Candidate, ExpertTerms, PerQuery

__all__ = ["Limits", "choose", "expert_terms", "price_for_budget"]

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
) -> Option | None:
    """The best single expert, or drafts and an expert, within the limits; None if nothing fits.

    ``judgeable``: whose answers come with log-probabilities and a calibration. Ties go to fewer
    experts, then to the order of ``terms``.
    """
    best: Option | None = None
    fits = partial(_fits, limits)
    for option in options(rule, terms, judgeable, fits, stages_max=limits.stages):
        if best is None or option.value > best.value + _TIE:
            best = option
    return best


def _fits(limits: Limits, terms: Sequence[ExpertTerms]) -> bool:
    worst = sum(limits.worst_micro_usd[term.expert] for term in terms)
    wait = sum(term.expected_wait_ms for term in terms)
    return (
        len(terms) <= limits.stages and worst <= limits.cost_micro_usd and wait < limits.deadline_ms
    )


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
