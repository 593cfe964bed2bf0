"""Which expert to bring from disk into host memory next, while another one generates. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["Prefetch", "next_prefetch"]


@dataclass(frozen=True, slots=True)
class Prefetch:
    """Load ``expert``; its room must not be taken from ``keep``."""

    expert: str
    keep: tuple[str, ...]


def next_prefetch(
    wanted: Sequence[str],
    in_pool: Collection[str],
    in_use: Sequence[str],
    swapping: str | None = None,
) -> Prefetch | None:
    """``wanted``: experts with work waiting or announced, the most wanted first. ``in_use``: the
    slot's resident and target. ``swapping``: whose swap is under way, and reads the disk itself.

    The first that host memory lacks is loaded. It may push out whatever nobody wants, and who is
    wanted less than itself; never the resident, the target, or who is wanted more: those would only
    have to come back.
    """
    for rank, expert in enumerate(wanted):
        if expert not in in_pool and expert != swapping:
            return Prefetch(expert, tuple(dict.fromkeys((*in_use, *wanted[:rank]))))
    return None
