"""``coe batch``: many requests through a running gateway, grouped by the expert that serves them.

Three passes. (1) Every line that is still open is routed: ``POST /v1/route``, which calls no model;
a line that names an expert needs no asking. (2) The lines are sent group by group, each group to
its last answer before the next begins, so that each expert is loaded once. (3) Each answer is
appended to the output file and committed to disk before its worker takes another line.

A request is always sent as it stands in the file. The expert from pass 1 only orders the lines;
writing it into ``model`` would make grouping exact, but would take away the policy's cascade,
fallbacks and caps, and so give another answer than the same request gets elsewhere. The price: when
the gateway's mind changes in between (an expert went away), a line may be served by another expert
than its group's, at the cost of a swap. ``Summary.served_by_another`` counts those.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from gateway.batch_client import GatewayAddress, GatewayClient, RouteHint, hint_of
from gateway.batch_files import InputFile, OutputFile, lines_left
from gateway.batch_lines import Answer, Lost, answer_line, lost_line, read_output_line
from gateway.batch_plan import (
    NO_EXPERT,
    Codes,
    Group,
    Indices,
    RetryRule,
    Tally,
    expert_changes,
    make_groups,
    run_order,
)

__all__ = ["BatchOptions", "Stop", "Summary", "Watcher", "run_batch"]

_ROUTE = "/v1/route"
_HINT_REFUSALS_MAX = 3


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """``grace_s``: how long requests in flight may go on once the batch is asked to stop."""

    gateway: GatewayAddress
    concurrency: int = 16
    grace_s: float = 10.0
    retry: RetryRule = field(default_factory=RetryRule)


class Watcher(Protocol):
    """Is told how far the batch is."""

    def routing(self, done: int, total: int) -> None: ...

    def sending(self, expert: str | None, done: int, total: int) -> None: ...


class Stop:
    """A wish to end: at the first ``ask`` in an orderly way, at the second at once."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.at_once = asyncio.Event()

    def ask(self) -> None:
        (self.at_once if self.asked.is_set() else self.asked).set()


@dataclass(slots=True)
class Summary:
    """``tally`` covers the whole output file; the rest, this run.

    ``changes_*`` count how often the expert differs from that of the line before, among the routed
    lines that this run wrote.
    """

    lines: int
    done_before: int
    tally: Tally
    cut_bytes: int = 0
    answered: int = 0
    failed: int = 0
    routed: int = 0
    served_by_another: int = 0
    changes_input_order: int = 0
    changes_run_order: int = 0
    groups: list[Group] = field(default_factory=list)
    stopped: bool = False
    elapsed_s: float = 0.0

    @property
    def done(self) -> int:
        return self.done_before + self.answered + self.failed

    @property
    def left(self) -> int:
        return self.lines - self.done

    @property
    def swaps_avoided(self) -> int:
        return self.changes_input_order - self.changes_run_order

    def as_json(self) -> dict[str, Any]:
        plain = (
            "lines done_before cut_bytes answered failed left routed served_by_another "
            "changes_input_order changes_run_order swaps_avoided stopped elapsed_s"
        )
        return {name: getattr(self, name) for name in plain.split()} | {
            "groups": [
                {"expert": g.expert, "lines": int(g.lines.size), "resident": g.resident}
                for g in self.groups
            ],
            "experts": {name: asdict(total) for name, total in self.tally.experts.items()},
            "total": asdict(self.tally.total),
        }


async def run_batch(
    source: InputFile,
    target: OutputFile,
    options: BatchOptions,
    *,
    stop: Stop,
    watch: Watcher,
    draw: Callable[[], float],
) -> Summary:
    """Send every line of ``source`` that has no answer in ``target``.

    ``draw`` gives the jitter of back-off, uniform in [0, 1). After a stop the summary says so and
    counts what is left.

    Raises:
        BatchError: the gateway is away, the output cannot be written, the input changed under us,
            or the two files do not belong together. Running again goes on from there.
    """
    started = time.monotonic()
    left = lines_left(source, target)
    summary = Summary(len(source), len(source) - left.size, target.tally, target.cut_bytes)
    async with GatewayClient(options.gateway) as client:
        run = _Run(source, target, options, client, stop, watch, draw, summary)
        await run.until_stopped(left)
    summary.stopped = summary.left > 0
    summary.elapsed_s = round(time.monotonic() - started, 3)
    return summary


class _Run:
    """One run. Its worker tasks share nothing but the iterator they take lines from."""

    def __init__(
        self,
        source: InputFile,
        target: OutputFile,
        options: BatchOptions,
        client: GatewayClient,
        stop: Stop,
        watch: Watcher,
        draw: Callable[[], float],
        summary: Summary,
    ) -> None:
        self._source = source
        self._target = target
        self._options = options
        self._client = client
        self._stop = stop
        self._watch = watch
        self._draw = draw
        self._summary = summary
        self._names: list[str] = []
        self._written = np.zeros(len(source), dtype=np.bool_)

    async def until_stopped(self, left: Indices) -> None:
        """All three passes; what is in flight at a stop gets its grace, then is cancelled."""
        work = asyncio.ensure_future(_unwrapped(self._passes(left)))
        asked = asyncio.ensure_future(self._stop.asked.wait())
        at_once = asyncio.ensure_future(self._stop.at_once.wait())
        try:
            await asyncio.wait({work, asked}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(
                {work, at_once},
                timeout=self._options.grace_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for task in (work, asked, at_once):
                task.cancel()
            await asyncio.wait({work, asked, at_once})
        if not work.cancelled():
            work.result()

    async def _passes(self, left: Indices) -> None:
        if not left.size:
            return
        codes = await self._route_all(left)
        if self._stop.asked.is_set():
            return
        groups = make_groups(left, codes, self._names)
        groups = run_order(groups, await self._resident(groups))
        self._summary.groups = groups
        try:
            for group in groups:
                if self._stop.asked.is_set():
                    break
                self._watch.sending(group.expert, self._summary.done, self._summary.lines)
                await self._in_parallel(partial(self._send, group), group.lines)
        finally:
            self._count_changes(codes[self._written[left]])

    def _count_changes(self, codes: Codes) -> None:
        """Over the lines that were written: in the file's order, and group by group."""
        self._summary.changes_input_order = expert_changes(codes)
        groups = np.unique(codes[codes != NO_EXPERT]).size
        self._summary.changes_run_order = max(0, groups - 1)

    # --- pass 1 ----------------------------------------------------------------------------------

    async def _route_all(self, left: Indices) -> Codes:
        """Each line's expert as an index into ``self._names``; NO_EXPERT where there is none."""
        experts = await self._client.expert_names()
        models, model_codes = self._source.models, self._source.model_codes[left]
        code_of: dict[str, int] = {}
        named = [code_of.setdefault(m, len(code_of)) if m in experts else NO_EXPERT for m in models]
        codes = np.array(named, dtype=np.int32)[model_codes]
        unnamed = np.flatnonzero(codes == NO_EXPERT)
        self._watch.routing(0, unnamed.size)

        async def route(at: int) -> None:
            hint = await self._hint(int(left[at]))
            if hint is not None:
                codes[at] = code_of.setdefault(hint.expert, len(code_of))
            self._summary.routed += 1
            self._watch.routing(self._summary.routed, unnamed.size)

        await self._in_parallel(route, unnamed)
        self._names = list(code_of)
        return codes

    async def _resident(self, groups: Iterable[Group]) -> frozenset[str]:
        """Which experts are loaded now: the first line of each group is routed once more."""
        found: set[str] = set()

        async def look(index: int) -> None:
            hint = await self._hint(index)
            if hint is not None and hint.resident:
                found.add(hint.expert)

        await self._in_parallel(look, [int(g.lines[0]) for g in groups if g.expert is not None])
        return frozenset(found)

    async def _hint(self, index: int) -> RouteHint | None:
        """Who would serve the line. Not worth many attempts: without it the line is sent last."""
        body, request_id = self._source.read(index).body, f"batch_route_{uuid.uuid4().hex}"
        return hint_of(await self._asked(_ROUTE, body, request_id, refusals_max=_HINT_REFUSALS_MAX))

    # --- passes 2 and 3 --------------------------------------------------------------------------

    async def _send(self, group: Group, index: int) -> None:
        line = self._source.read(index)
        line_id = f"batch_req_{uuid.uuid4().hex}"
        try:
            outcome = await self._asked(line.url, line.body, line_id, patient=not line.own_deadline)
        except _StoppedWaiting:
            return  # no answer yet: the next run asks again
        if isinstance(outcome, Lost):
            written = lost_line(line_id, line.custom_id, outcome)
        else:
            written = answer_line(line_id, line.custom_id, outcome)
        self._target.append(written)
        self._written[index] = True
        self._count(written, group)
        await self._target.commit()

    def _count(self, written: bytes, group: Group) -> None:
        """From the line itself, as a later run would read it."""
        _, charge = read_output_line(written)
        summary = self._summary
        summary.tally.add(charge)
        if charge.ok:
            summary.answered += 1
            summary.served_by_another += group.expert not in (None, charge.expert)
        else:
            summary.failed += 1
        self._watch.sending(group.expert, summary.done, summary.lines)

    # --- all passes ------------------------------------------------------------------------------

    async def _asked(
        self,
        path: str,
        body: bytes,
        request_id: str,
        *,
        refusals_max: int | None = None,
        patient: bool = False,
    ) -> Answer | Lost:
        """The final outcome, after as many attempts as the rule, or ``refusals_max``, allows.
        ``patient``: refusals for want of time do not count among them.

        Raises:
            BatchError: the gateway itself is away, so the line is not to blame.
            _StoppedWaiting: a stop was asked for before an attempt gave a final outcome.
        """
        attempt, began_s, rule = 0, time.monotonic(), self._options.retry
        while True:
            outcome = await self._client.post(path, body, request_id)
            asked_for_s = time.monotonic() - began_s
            wait_s = rule.busy_wait_s(outcome, asked_for_s, self._draw()) if patient else None
            if wait_s is None:
                attempt += 1
                wait_s = rule.wait_s(outcome, attempt, self._draw())
            if wait_s is None or (attempt == refusals_max and isinstance(outcome, Answer)):
                break
            await self._pause(wait_s)
        if isinstance(outcome, Lost) and not await self._client.is_up():
            raise self._client.gone(outcome)
        return outcome

    async def _pause(self, wait_s: float) -> None:
        try:
            async with asyncio.timeout(wait_s):
                await self._stop.asked.wait()
        except TimeoutError:
            return
        raise _StoppedWaiting

    async def _in_parallel(
        self, work: Callable[[int], Awaitable[None]], items: Iterable[int]
    ) -> None:
        """``work`` on every item, in order of start, a bounded number at a time."""
        shared = iter(items)

        async def take() -> None:
            for item in shared:
                if self._stop.asked.is_set():
                    return
                await work(int(item))

        async with asyncio.TaskGroup() as group:
            for _ in range(self._options.concurrency):
                group.create_task(take())


class _StoppedWaiting(Exception):
    """A stop came while a line waited for its next attempt."""


async def _unwrapped(work: Coroutine[Any, Any, None]) -> None:
    """The work, with the first real error of a task group raised as itself."""
    try:
        await work
    except BaseExceptionGroup as group:
        real = [error for error in group.exceptions if not isinstance(error, _StoppedWaiting)]
        if real:
            raise real[0] from None
