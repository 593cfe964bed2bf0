"""Arithmetic of reservations: what a call may cost at most, what it did cost, what goes back.

Pure. Whole micro-dollars, every call rounded up, so that the sum of bounds bounds the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from experts.types import ExpertSpec, Usage


@dataclass(frozen=True, slots=True)
class Settlement:
    """How a reservation ends. ``overrun_micro_usd`` is what the reservation did not cover."""

    charge_micro_usd: int
    refund_micro_usd: int
    overrun_micro_usd: int


def worst_case(spec: ExpertSpec, prompt_tokens: int, max_output_tokens: int) -> int:
    """Micro-dollars of a call that uses its whole allowance. Raises ValueError below zero.

    A caller who asks for n answers passes n times the output tokens of one.
    """
    if prompt_tokens < 0 or max_output_tokens < 0:
        raise ValueError("token counts cannot be negative")
    return spec.price.cost_micro_usd(prompt_tokens, max_output_tokens)


def actual_cost(spec: ExpertSpec, usage: Usage) -> int:
    """Micro-dollars of a call from the tokens it reported."""
    return spec.price.cost_micro_usd(usage.input_tokens, usage.output_tokens)


def settle(reserved_micro_usd: int, spent_micro_usd: int) -> Settlement:
    """Charge what was spent and give back the rest of the reservation."""
    if reserved_micro_usd < 0 or spent_micro_usd < 0:
        raise ValueError("money cannot be negative")
    return Settlement(
        charge_micro_usd=spent_micro_usd,
        refund_micro_usd=max(0, reserved_micro_usd - spent_micro_usd),
        overrun_micro_usd=max(0, spent_micro_usd - reserved_micro_usd),
    )
