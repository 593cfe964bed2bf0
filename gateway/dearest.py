"""What an answer would have cost at the dearest expert: the baseline of everything saved. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from experts.types import Price, Usage

__all__ = ["dearest_cost_micro_usd", "dearest_prices"]


def dearest_prices(prices: Iterable[Price]) -> tuple[Price, ...]:
    """The prices that can be the dearest for some answer: no other is as high in both directions.

    A handful of hundreds, so that the maximum over all experts is cheap to take per request.
    """
    front: list[Price] = []
    for price in sorted(set(prices), key=_both, reverse=True):
        if not front or price.output_micro_usd_per_mtok > front[-1].output_micro_usd_per_mtok:
            front.append(price)
    return tuple(front)


def dearest_cost_micro_usd(front: Sequence[Price], usage: Usage) -> int:
    """The highest charge for this usage; 0 without experts."""
    return max(
        (p.cost_micro_usd(usage.input_tokens, usage.output_tokens) for p in front), default=0
    )


def _both(price: Price) -> tuple[int, int]:
    return price.input_micro_usd_per_mtok, price.output_micro_usd_per_mtok
