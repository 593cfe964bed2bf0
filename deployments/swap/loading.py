"""Weights between disk and host memory, beside what the slot runs: one thing at a time.

Two things cause one. Ahead of need: the most wanted expert that host memory lacks. By command: the
cluster's placement wants an expert here, or wants its memory back. A command never costs anybody
who waits: it takes only free room, yields to whoever needs the disk now, and lets go of nothing
that is resident, waited for, or about to be.

All state belongs to the event loop of the slot's driver.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Protocol

from deployments.swap.effects import SlotSnapshot
from deployments.swap.prefetch import Prefetch, next_prefetch
from deployments.swap.states import SlotPhase
from experts.errors import ExpertOutOfService, HostUnavailable, PlacementRefused, SwapFailed

__all__ = ["Prefetcher", "WeightLoading"]

_log = logging.getLogger(__name__)

COMMAND_MS_MAX = 120_000.0


class Prefetcher(Protocol):
    """Whoever can bring an expert's weights from disk into host memory, and let go of them."""

    @property
    def in_pool(self) -> Collection[str]: ...

    async def prefetch(self, expert: str, keep: Sequence[str]) -> bool:
        """Returns when the weights are there, or False when that is not possible now. Runs beside
        generations and swaps. Raises ``SwapFailed`` when the weights cannot be loaded."""
        ...

    async def evict(self, expert: str) -> None:
        """Give up the expert's weights in host memory, if they are there."""
        ...


class SlotView(Protocol):
    """What has to be known of the slot; ``deployments.swap.core.Scheduler`` shows it."""

    def visible_state(self) -> tuple[object, ...]: ...

    def wanted(self) -> list[str]: ...

    def snapshot(self) -> SlotSnapshot: ...


class WeightLoading:
    """See the module's docstring. ``pause_ms``: how long after a load ahead that could not be done
    another is tried. ``retire`` takes an expert out of service, with the reason. ``moving`` names
    the expert of the command under way.
    """

    def __init__(
        self,
        slot: SlotView,
        prefetcher: Prefetcher | None,
        experts: Sequence[str],
        *,
        pause_ms: float,
        clock: Callable[[], float],
        retire: Callable[[str, str], None],
    ) -> None:
        self.moving: str | None = None
        self._slot = slot
        self._prefetcher = prefetcher
        self._experts = tuple(experts)
        self._pause_ms = pause_ms
        self._clock = clock
        self._retire = retire
        self._task: asyncio.Task[bool] | None = None
        self._busy_with: str | None = None  # whose weights the task is about
        self._again_ms = -math.inf
        self._closed = False

    async def aclose(self) -> None:
        """Stop a load under way; nothing is begun any more."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # --- ahead of need ----------------------------------------------------------------------------

    def look_ahead(self) -> None:
        """Have the most wanted expert loaded that host memory lacks."""
        if self._prefetcher is None or self._task is not None or self._closed:
            return
        if len(self._prefetcher.in_pool) >= len(self._experts) or self._clock() < self._again_ms:
            return
        following = self._most_wanted(self._prefetcher)
        if following is not None:
            self._begin(self._prefetcher, following, pause_ms=self._pause_ms)

    def _most_wanted(self, prefetcher: Prefetcher) -> Prefetch | None:
        _, resident, target, *_ = self._slot.visible_state()
        in_use = [str(expert) for expert in (resident, target) if expert is not None]
        wanted = self._slot.wanted()
        return next_prefetch(wanted, prefetcher.in_pool, in_use, self._swapping_to())

    def _swapping_to(self) -> str | None:
        """Whose swap is under way, and reads the disk itself if it has to."""
        phase, _, target, *_ = self._slot.visible_state()
        return str(target) if phase is SlotPhase.SWAPPING else None

    def _begin(
        self, prefetcher: Prefetcher, what: Prefetch, *, pause_ms: float = 0.0
    ) -> asyncio.Task[bool]:
        return self._occupy(what.expert, lambda: self._read(prefetcher, what, pause_ms))

    def _occupy(self, expert: str, work: Callable[[], Awaitable[bool]]) -> asyncio.Task[bool]:
        """The one place for work on host memory; it ends by itself, whoever waits for it."""
        self._busy_with = expert
        self._task = asyncio.get_running_loop().create_task(
            self._work_off(work), name=f"weights of {expert}"
        )
        return self._task

    async def _work_off(self, work: Callable[[], Awaitable[bool]]) -> bool:
        try:
            done = await work()
        finally:
            self._task, self._busy_with = None, None
        if not self._closed and done:
            self.look_ahead()
        return done

    async def _read(self, prefetcher: Prefetcher, what: Prefetch, pause_ms: float) -> bool:
        """Whether the weights came; an expert whose weights cannot be loaded is retired.
        ``pause_ms``: if they did not, how long until something is loaded ahead again."""
        failure: str | None = None
        loaded = False
        try:
            loaded = await prefetcher.prefetch(what.expert, what.keep)
        except SwapFailed as error:
            failure = error.reason
        # The task's outermost frame. The swap itself will meet the trouble, and say what it is.
        except Exception:  # noqa: BLE001
            _log.exception("loading %s ahead raised an unexpected error", what.expert)
        if not loaded:
            self._again_ms = max(self._again_ms, self._clock() + pause_ms)
        if failure is not None and not self._closed:
            self._retire(what.expert, failure)
        return loaded

    # --- by command -------------------------------------------------------------------------------

    async def pool(self, expert: str) -> None:
        """Bring an expert's weights into free room of host memory; returns when they are there, at
        once if they are already.

        Raises PlacementRefused, ExpertOutOfService (also when its weights turn out to be bad) and
        HostUnavailable (closing). A caller that leaves does not stop the load.
        """
        prefetcher = self._ready(expert)
        if expert in prefetcher.in_pool and self._busy_with != expert:
            return
        self._refuse_out_of_service(expert)
        load = self._task if self._busy_with == expert else None
        if load is None:
            self._refuse_pool(prefetcher, expert)
            load = self._begin(prefetcher, Prefetch(expert, tuple(sorted(prefetcher.in_pool))))
        await self._finished(expert, load)
        self._refuse_out_of_service(expert)
        if expert not in prefetcher.in_pool:
            reason = "no free room in host memory, or its engine had no way to read it just now"
            raise PlacementRefused(expert, reason)

    async def evict(self, expert: str) -> None:
        """Let go of an expert's weights in host memory, if they are there and nobody needs them.

        Raises PlacementRefused and HostUnavailable (closing). It does not stop when its caller
        leaves.
        """
        prefetcher = self._ready(expert)
        if expert not in prefetcher.in_pool and self._busy_with != expert:
            return
        self._refuse_while_busy(expert)
        work = self._occupy(expert, lambda: self._let_go(prefetcher, expert))
        await self._finished(expert, work)
        if expert in prefetcher.in_pool:
            raise PlacementRefused(expert, "its engine did not let go of it; see the host's log")

    async def _let_go(self, prefetcher: Prefetcher, expert: str) -> bool:
        self._refuse_evict(expert)  # here: what is true now is what was true when it is sent
        try:
            await prefetcher.evict(expert)
        # The task's outermost frame: an engine that just ended raises what it will, and holds
        # nothing any more. Whether the weights are gone is looked at by whoever asked.
        except Exception:  # noqa: BLE001
            _log.exception("evicting %s raised an unexpected error", expert)
            return False
        return True

    async def _finished(self, expert: str, work: asyncio.Task[bool]) -> None:
        self.moving = expert
        work.add_done_callback(self._moved)
        await asyncio.wait({work}, timeout=COMMAND_MS_MAX / 1000)
        if not work.done():
            reason = f"work on its weights goes on after {COMMAND_MS_MAX:.0f} ms"
            raise PlacementRefused(expert, reason)
        if work.cancelled():
            raise HostUnavailable(expert)
        work.result()

    def _ready(self, expert: str) -> Prefetcher:
        if self._closed:
            raise HostUnavailable(expert)
        if self._prefetcher is None:
            raise PlacementRefused(expert, "this host keeps no weight pool")
        if self.moving not in (None, expert):
            raise PlacementRefused(expert, f"expert {self.moving!r} is being moved")
        return self._prefetcher

    def _refuse_while_busy(self, expert: str) -> None:
        if self._busy_with is not None:
            raise PlacementRefused(expert, f"host memory is busy with {self._busy_with!r}")

    def _refuse_pool(self, prefetcher: Prefetcher, expert: str) -> None:
        self._refuse_while_busy(expert)
        if self._swapping_to() == expert:
            raise PlacementRefused(expert, "a swap is bringing it in")
        waiting = self._most_wanted(prefetcher)
        if waiting is not None:
            raise PlacementRefused(expert, f"{waiting.expert!r} is waited for and not there either")

    def _refuse_evict(self, expert: str) -> None:
        _, resident, target, *_ = self._slot.visible_state()
        reasons = {
            "it is resident": resident == expert,
            "the slot is about to turn to it": target == expert,
            "requests for it wait or are announced": expert in self._slot.wanted(),
        }
        for reason, holds in reasons.items():
            if holds:
                raise PlacementRefused(expert, reason)

    def _refuse_out_of_service(self, expert: str) -> None:
        why = self._slot.snapshot().out_of_service.get(expert)
        if why is not None:
            raise ExpertOutOfService(expert, why)

    def _moved(self, work: asyncio.Task[bool]) -> None:
        self.moving = None
        if not work.cancelled():
            work.exception()  # a refusal that nobody waits for any more is no error
