"""The price of money at which a per-query policy keeps to a budget, for ``coe policy check``."""

from __future__ import annotations

from experts.catalogue import Catalogue
from experts.errors import ConfigError
from experts.types import MICRO_USD_PER_USD
from policies.money import worst_case
from policies.objective import Limits, price_for_budget
from policies.plan import is_judgeable
from policies.types import Candidate, Policy

__all__ = ["solved_price"]


def solved_price(
    policy: Policy, catalogue: Catalogue, budget_usd: float, prompt_tokens: int
) -> str:
    """A sentence with the solved ``quality_per_usd``, its expected cost and quality.

    Every category of the table counts alike, and every expert as resident: the file knows neither
    traffic nor state. Raises ConfigError without a per-query section or below the cheapest choice.
    """
    rule = policy.per_query
    if rule is None:
        raise ConfigError(policy.name, None, "per_query", "is not there, so nothing can be solved")
    specs = [catalogue.get(name) for name in rule.experts]
    limits = Limits(
        policy.caps.stages,
        policy.caps.cost_micro_usd,
        policy.caps.deadline_ms,
        {s.id: worst_case(s, prompt_tokens, policy.max_output_tokens_default) for s in specs},
    )
    try:
        priced, cost, quality = price_for_budget(
            rule,
            [Candidate(spec, resident=True) for spec in specs],
            dict.fromkeys(rule.quality, 1.0),
            {spec.id: is_judgeable(policy, spec) for spec in specs},
            limits,
            prompt_tokens=prompt_tokens,
            budget_micro_usd=budget_usd * MICRO_USD_PER_USD,
        )
    except ValueError as error:
        raise ConfigError(policy.name, None, "--budget-usd-per-request", str(error)) from error
    return (
        f"quality_per_usd: {priced.quality_per_usd:.6g}   # expected "
        f"{cost / MICRO_USD_PER_USD:.3g} USD and quality {quality:.3f} per request of "
        f"{prompt_tokens} prompt and {rule.output_tokens_expected} output tokens"
    )
