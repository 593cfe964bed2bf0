"""The fewest swaps with which requests can be served in a given order: Belady's optimum.

L. A. Belady, "A study of replacement algorithms for a virtual-storage computer" (1966), algorithm
MIN: on a miss, give up what is needed farthest in the future. With k places no other choice of
victims misses less often on the same sequence, so for any policy the number below bounds from under
the swaps of every schedule on k slots that starts the policy's requests in the order in which the
policy started them: such a schedule may not evict what still runs, MIN may.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict, deque
from collections.abc import Sequence

__all__ = ["fewest_swaps"]


def fewest_swaps(started: Sequence[str], slots: int) -> int:
    """Misses of MIN on this sequence of experts with ``slots`` places, empty at first."""
    if slots < 1:
        raise ValueError(f"slots must be at least 1, not {slots}")
    uses: dict[str, deque[int]] = defaultdict(deque)
    for position, expert in enumerate(started):
        uses[expert].append(position)
    held: dict[str, float] = {}  # expert: its next use
    farthest: list[tuple[float, str]] = []  # heap of (-next use, expert); outdated entries linger
    misses = 0
    for expert in started:
        uses[expert].popleft()
        next_use = float(uses[expert][0]) if uses[expert] else math.inf
        if expert not in held:
            misses += 1
            if len(held) == slots:
                _evict_farthest(held, farthest)
        held[expert] = next_use
        heapq.heappush(farthest, (-next_use, expert))
    return misses


def _evict_farthest(held: dict[str, float], farthest: list[tuple[float, str]]) -> None:
    while True:
        negated, expert = heapq.heappop(farthest)
        if held.get(expert) == -negated:
            del held[expert]
            return
