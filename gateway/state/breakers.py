"""The breakers of one gateway worker, kept in step with those of all others through the store.

Asking whether a target may be called never waits for the store: this worker's copies are asked. A
background task reports what was seen and learns what others saw, at once after a failure and twice
a second otherwise. Only the probe of a half-open breaker is claimed in the store first, because of
all gateways one may probe. While the store is away the copies go on by themselves.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from deployments.store import Argument, StateStore, load_script
from experts.errors import StateUnavailable
from gateway.breakers import Breaker, BreakerRules, BreakerState, Calls, Probe

__all__ = ["BreakerBoard", "Passage", "TargetView"]

log = logging.getLogger(__name__)

TARGETS_MAX = 2_000  # experts and hosts of one gateway; the longest unused copy goes first
_PER_TARGET = 5
_PACKAGE = "gateway.state"
_ONE_OK = Calls(ok=1)


@dataclass(frozen=True, slots=True)
class TargetView:
    """A breaker as people see it. ``wait_ms``: until it may be tried."""

    state: BreakerState
    wait_ms: int
    failures_in_a_row: int


@dataclass(slots=True)
class _Copy:
    """This worker's copy of a breaker, and what it has not reported yet."""

    breaker: Breaker
    calls: Calls = field(default_factory=Calls)
    probe: Probe | None = None


class BreakerBoard:
    """Its owner is one event loop. ``store`` None: breakers of this worker alone.

    ``now_ms`` is a monotonic clock. ``on_change`` is told each target whose state changed here.
    """

    def __init__(
        self,
        store: StateStore | None = None,
        *,
        rules: BreakerRules | None = None,
        now_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
        sync_ms: float = 500.0,
        on_change: Callable[[str, BreakerState], None] = lambda _target, _state: None,
    ) -> None:
        self.rules = rules or BreakerRules()
        self._store = store
        self._now = now_ms
        self._sync_ms = sync_ms
        self._on_change = on_change
        self._copies: OrderedDict[str, _Copy] = OrderedDict()
        self._tripped: set[str] = set()  # targets that are not closed: empty on a good day
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._was_away = False
        if store is not None:
            common = load_script(_PACKAGE, "breaker_common.lua")
            for name in ("sync", "probe"):
                text = load_script(_PACKAGE, f"breaker_{name}.lua")
                store.add_script(f"breaker_{name}", common + text)

    @property
    def held(self) -> int:
        """Targets held in this process."""
        return len(self._copies)

    # --- asking ----------------------------------------------------------------------------------

    def wait_ms(self, target: str) -> int:
        """Until a call of the target may be tried; 0: it may now (half open: as the probe)."""
        if target not in self._tripped:
            return 0
        return self._copies[target].breaker.wait_ms(self._now_whole())

    def tripped(self) -> Mapping[str, TargetView]:
        """Every target that is not closed, as this worker knows it."""
        now_ms = self._now_whole()
        return {target: self._view(target, now_ms) for target in sorted(self._tripped)}

    async def enter(self, targets: Iterable[str]) -> Passage | str:
        """Leave to call these targets now, or the one of them that refuses.

        Asks the store only when one of them is half open.
        """
        asked = tuple(targets)
        if not any(target in self._tripped for target in asked):
            return Passage(self, asked, ())
        probing: list[str] = []
        try:
            for target in asked:
                if target in self._tripped:
                    if not await self._claim(target):
                        Passage(self, asked, tuple(probing)).abandoned()
                        return target
                    if target in self._tripped:  # the claim may have found it closed
                        probing.append(target)
        except BaseException:  # cancelled while the store was asked
            Passage(self, asked, tuple(probing)).abandoned()
            raise
        return Passage(self, asked, tuple(probing))

    async def _claim(self, target: str) -> bool:
        breaker, now_ms = self._copies[target].breaker, self._now_whole()
        if breaker.wait_ms(now_ms) > 0:
            return False
        # The place is taken here before the store is asked, so that one request asks, not all.
        breaker.claim(self.rules, now_ms)
        answer = await self._claim_shared(target)
        if answer is None or answer == 0:
            return True
        breaker.probe_until_ms = 0
        if answer < 0:
            self._close(target)
            return True
        breaker.open_until_ms = max(breaker.open_until_ms, self._now_whole() + answer)
        return False

    async def _claim_shared(self, target: str) -> int | None:
        """What the script answers; None when there is no store to ask."""
        if self._store is None:
            return None
        try:
            reply: int = await self._store.eval_script(
                "breaker_probe", self._keys(), ["", target, self.rules.probe_lease_ms]
            )
        except StateUnavailable:
            return None
        except BaseException:  # cancelled; the store may have given the place away by then
            self.note_probe(target, Probe.ABANDONED)
            raise
        return reply

    # --- being told ------------------------------------------------------------------------------

    def note_ok(self, target: str) -> None:
        """A call of the target ended well."""
        copy = self._copy(target)
        copy.calls = copy.calls.with_ok()
        copy.breaker.record(self.rules, _ONE_OK, self._now_whole())

    def note_failure(self, target: str) -> None:
        """A call failed, and the target is to blame."""
        copy = self._copy(target)
        copy.calls = copy.calls.with_failure()
        copy.breaker.record(self.rules, Calls(0, 1, 1), self._now_whole())
        self._look(target)
        self._wake.set()

    def note_probe(self, target: str, outcome: Probe) -> None:
        """The probe that ``enter`` let pass has ended."""
        copy = self._copy(target)
        copy.probe = outcome
        copy.breaker.probed(self.rules, outcome, self._now_whole())
        self._look(target)
        self._wake.set()

    # --- in step with the others -----------------------------------------------------------------

    def start(self) -> None:
        """Begin to report and to learn; without a store there is nobody to tell."""
        if self._task is None and self._store is not None:
            self._task = asyncio.create_task(self._run(), name="breakers")

    async def aclose(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def sync(self, now_ms: int | None = None) -> None:
        """Report what was seen and learn the rest. Raises StateUnavailable.

        ``now_ms`` replaces the store's clock, for tests.
        """
        if self._store is None:
            return
        probes = {t: copy.probe for t, copy in self._copies.items() if copy.probe is not None}
        reports = self._take_reports()
        try:
            reply = await self._report(reports, now_ms)
        except StateUnavailable:
            # Unheard of, a probe would hold its place in the store until its lease ends.
            for target, outcome in probes.items():
                copy = self._copy(target)
                copy.probe = copy.probe or outcome
            raise
        self._learn(reply)

    async def _report(self, reports: list[Argument], now_ms: int | None) -> list[bytes | int]:
        assert self._store is not None
        rules = self.rules
        reply: list[bytes | int] = await self._store.eval_script(
            "breaker_sync",
            self._keys(),
            [
                "" if now_ms is None else now_ms,
                rules.failures_in_a_row,
                rules.failure_share,
                rules.calls_min,
                rules.slot_ms,
                rules.open_ms,
                rules.open_max_ms,
                *reports,
            ],
        )
        return reply

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self.sync()
                self._was_away = False
            except StateUnavailable:
                self._was_away = True
            except Exception:  # outermost frame of the task; breakers must not freeze
                log.exception("sharing the breakers failed")
            await self._pause()

    async def _pause(self) -> None:
        """Until something happens; but the store is never asked more than fifty times a second."""
        await asyncio.sleep(0.02)
        try:
            async with asyncio.timeout(self._sync_ms / 1000.0):
                await self._wake.wait()
        except TimeoutError:
            return

    def _take_reports(self) -> list[Argument]:
        reports: list[Argument] = []
        now_ms = self._now_whole()
        for target, copy in self._copies.items():
            if copy.probe is not None:
                ok, failed = copy.probe is Probe.OK, copy.probe is Probe.FAILED
                reports += [target, "probe", int(ok), int(failed), 0]
            elif copy.calls != Calls():
                calls = copy.calls
                reports += [target, "calls", calls.ok, calls.failed, calls.failed_last]
            if self._was_away and (left_ms := copy.breaker.open_until_ms - now_ms) > 0:
                reports += [target, "open", left_ms, 0, 0]
            copy.calls, copy.probe = Calls(), None
        return reports

    def _learn(self, reply: list[bytes | int]) -> None:
        """Take the store's view over, but not of targets that have news of their own by now."""
        now_ms = self._now_whole()
        seen: set[str] = set()
        for target, in_a_row, open_for_ms, backoff_ms, probe_for_ms in _fives(reply):
            seen.add(target)
            copy = self._copy(target)
            if copy.calls == Calls() and copy.probe is None:
                breaker = copy.breaker
                breaker.in_a_row, breaker.backoff_ms = in_a_row, backoff_ms
                breaker.open_until_ms = 0 if open_for_ms < 0 else max(1, now_ms + open_for_ms)
                breaker.probe_until_ms = now_ms + probe_for_ms if probe_for_ms else 0
                self._look(target)
        for target in self._tripped - seen:
            copy = self._copies[target]
            if copy.calls == Calls() and copy.probe is None:
                self._close(target)

    # --- copies ----------------------------------------------------------------------------------

    def _copy(self, target: str) -> _Copy:
        copy = self._copies.get(target)
        if copy is None:
            copy = self._copies[target] = _Copy(Breaker())
            while len(self._copies) > TARGETS_MAX:
                oldest, _ = self._copies.popitem(last=False)
                self._tripped.discard(oldest)
        self._copies.move_to_end(target)
        return copy

    def _close(self, target: str) -> None:
        breaker = self._copies[target].breaker
        breaker.open_until_ms = breaker.backoff_ms = breaker.probe_until_ms = 0
        self._look(target)

    def _look(self, target: str) -> None:
        """Note whether the target is closed, and say so when that is new."""
        tripped = self._copies[target].breaker.open_until_ms != 0
        if tripped == (target in self._tripped):
            return
        if tripped:
            self._tripped.add(target)
            log.warning("breaker of %s opened", target)
            self._on_change(target, BreakerState.OPEN)
        else:
            self._tripped.discard(target)
            log.warning("breaker of %s closed", target)
            self._on_change(target, BreakerState.CLOSED)

    def _view(self, target: str, now_ms: int) -> TargetView:
        breaker = self._copies[target].breaker
        return TargetView(breaker.state(now_ms), breaker.wait_ms(now_ms), breaker.in_a_row)

    def _keys(self) -> list[str]:
        assert self._store is not None
        return [self._store.key("{breakers}", part) for part in ("state", "tripped")]

    def _now_whole(self) -> int:
        return int(self._now())


class Passage:
    """One call's leave to run, to be handed back with the call's outcome. Idempotent."""

    __slots__ = ("_board", "_open", "_probing", "_targets")

    def __init__(
        self, board: BreakerBoard, targets: tuple[str, ...], probing: tuple[str, ...]
    ) -> None:
        self._board = board
        self._targets = targets
        self._probing = probing
        self._open = True

    def answered(self) -> None:
        """The upstream began to answer: enough for a probe, which must not last for a stream."""
        for target in self._probing:
            self._board.note_probe(target, Probe.OK)
        self._probing = ()

    def succeeded(self) -> None:
        if self._open:
            self._open = False
            self.answered()
            for target in self._targets:
                self._board.note_ok(target)

    def failed(self, to_blame: Iterable[str]) -> None:
        """``to_blame``: the targets that the failure speaks against (``breakers.faults``)."""
        if self._open:
            self._open = False
            blamed = frozenset(to_blame)
            for target in self._targets:
                if target in self._probing:
                    outcome = Probe.FAILED if target in blamed else Probe.ABANDONED
                    self._board.note_probe(target, outcome)
                elif target in blamed:
                    self._board.note_failure(target)
            self._probing = ()

    def abandoned(self) -> None:
        """The call ended without saying anything of the upstream."""
        self.failed(())


def _fives(reply: list[bytes | int]) -> Iterator[tuple[str, int, int, int, int]]:
    for at in range(0, len(reply), _PER_TARGET):
        target, *numbers = reply[at : at + _PER_TARGET]
        assert isinstance(target, bytes)
        in_a_row, open_for, backoff, probe_for = (int(n) for n in numbers)
        yield target.decode(), in_a_row, open_for, backoff, probe_for
