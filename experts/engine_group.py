"""One device, several engines: what a host runs, whatever its experts' architectures.

Experts of one architecture share a running engine and are exchanged in place. A host whose experts
have several architectures runs one engine for each, of which one is awake; the others sleep (vLLM
sleep mode). ``make_resident`` therefore has three ways, cheapest first: in place; wake the expert's
engine, then in place; start the engine, when it is not there.

The order of steps is decided by ``experts.engine_states``; this module carries them out, one at a
time. What it does about vLLM's sleep mode:

- each engine sleeps and wakes once at start, before traffic: the first sleep pays for pinning, and
  a wake that cannot work shows while nobody waits;
- memory on the device is read before an engine starts, with it awake and with it asleep. An engine
  beside whose sleepers another could no longer wake is not kept;
- a wake that fails is tried once more (vLLM goes on where it stopped; nothing rolls it back). If it
  fails again the engine is killed and the expert reported as failed; the engine's other experts
  start it afresh when they are asked for;
- after every wake the expert that is to serve is asked its canary before anybody else asks it
  anything; an engine that fails it is killed;
- an engine that does not fall asleep is killed, too: it holds memory that the next one needs.

On a platform without sleep mode (CPU) sleeping engines keep their memory. The order of steps and
vLLM's calls are the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from experts.compat import (
    architecture_digest,
    engine_groups,
    folder_differences,
    unreadable,
    weights_bytes,
)
from experts.device_memory import (
    DeviceMemory,
    Footprint,
    footprint,
    pool_shares,
    shortfalls,
    start_utilization,
)
from experts.engine_states import Action, EngineEvent, EngineState, next_step, transition
from experts.errors import ArtifactError, CanaryMismatch, CoeError, HostLost, SwapFailed
from experts.types import Endpoint
from experts.vllm_engine import EngineSettings, Pooled, SwappableEngine, SwapReport

__all__ = ["EngineGroup", "EnginePool", "GroupReport"]

_WAKES_MAX = 2


class MemberEngine(Protocol):
    """What the group needs of an engine; ``SwappableEngine`` is one."""

    resident: str | None
    entry_bytes: int
    load_ms: float | None

    @property
    def pooled(self) -> Mapping[str, Pooled]: ...

    @property
    def in_pool(self) -> frozenset[str]: ...

    async def make_resident(self, expert: str, keep: Sequence[str] = ()) -> SwapReport: ...

    async def prefetch(self, expert: str, keep: Sequence[str] = ()) -> bool: ...

    async def evict(self, expert: str) -> None: ...

    async def sleep(self) -> None: ...

    async def wake(self) -> bool: ...

    async def prove(self, expert: str) -> float: ...

    async def device_memory(self) -> DeviceMemory | None: ...

    async def serve(
        self, expert: str, endpoint: Endpoint, body: Mapping[str, Any], *, request_id: str
    ) -> dict[str, Any] | AsyncIterator[str]: ...

    async def check_health(self) -> None: ...

    def shutdown(self) -> None: ...


class StartEngine(Protocol):
    """Starts an engine with the experts in its pool; ``SwappableEngine.start`` is one."""

    async def __call__(
        self,
        experts: Mapping[str, str],
        settings: EngineSettings,
        *,
        progress: Callable[[str], None],
        lazy: bool = False,
    ) -> tuple[MemberEngine, dict[str, str]]: ...


@dataclass(frozen=True, slots=True)
class GroupReport:
    """What making an expert resident took. ``way``: "in_place", "wake" or "start", the dearest of
    the steps; ``turn_ms``: of putting engines to sleep, waking and starting; ``swap``: the copy."""

    way: str
    turn_ms: float
    swap: SwapReport


@dataclass(frozen=True, slots=True)
class EnginePool:
    """One running engine's part of the host's weight pool.

    ``group``: digest of the architecture, the same on every host. ``limit_bytes`` bounds its
    entries, each of which takes ``entry_bytes``. ``experts``: all that the engine can run;
    ``pooled``: those whose weights are in host memory now.
    """

    group: str
    limit_bytes: int
    entry_bytes: int
    experts: tuple[str, ...]
    pooled: frozenset[str]


@dataclass(slots=True)
class _Member:
    experts: dict[str, str]  # expert -> folder
    settings: EngineSettings
    group: str = ""
    state: EngineState = EngineState.ABSENT
    engine: MemberEngine | None = None
    before: DeviceMemory | None = None  # with every other engine asleep
    footprint: Footprint | None = None

    @property
    def running(self) -> MemberEngine:
        assert self.engine is not None
        return self.engine

    def on(self, event: EngineEvent) -> None:
        self.state = transition(self.state, event)


class EngineGroup:
    """See the module's docstring. Not safe for concurrent use, but for ``prefetch`` and
    ``evict``: whoever owns the slot sees to it that nothing generates while ``make_resident``
    runs."""

    def __init__(
        self,
        members: Mapping[str, _Member],
        start_engine: StartEngine,
        progress: Callable[[str], None],
    ) -> None:
        self._members = dict(members)
        self._start_engine = start_engine
        self._progress = progress

    # --- start and stop ---------------------------------------------------------------------------

    @classmethod
    async def start(
        cls,
        experts: Mapping[str, str],
        settings: EngineSettings,
        *,
        engines_max: int,
        progress: Callable[[str], None],
        start_engine: StartEngine = SwappableEngine.start,
    ) -> tuple[EngineGroup, dict[str, str]]:
        """Start an engine for each architecture among ``experts`` (expert -> weight folder).

        Returns the group, its first engine awake, and for experts out of service the reason;
        raises ArtifactError when no expert could be loaded.
        """
        refused = unreadable(experts)
        readable = {name: path for name, path in experts.items() if name not in refused}
        members, too_many = plan_members(readable, settings, engines_max)
        refused |= too_many
        self = cls(members, start_engine, progress)
        try:
            for name in list(self._members):
                refused |= await self._bring_up(name)
            if not self._members:
                raise ArtifactError("experts", "none could be loaded", refused)
            await self._wake_first()
        except BaseException:
            self.shutdown()
            raise
        return self, refused

    async def _wake_first(self) -> None:
        """A failure here leaves the slot empty; the first request finds out more."""
        try:
            await self._turn_to(next(iter(self._members)))
        except CoeError as error:
            self._progress(error.message)

    async def _bring_up(self, name: str) -> dict[str, str]:
        """Start one engine and rehearse its sleep. Returns the experts it cannot serve."""
        member = self._members[name]
        try:
            await self._put_others_to_sleep(name)
            refused = await self._start(name, lazy=False)
            if len(self._members) > 1:
                await self._rehearse(name)
        except ArtifactError as error:
            del self._members[name]
            return {e: error.differences.get(e, error.message) for e in member.experts}
        except CoeError as error:  # its sleep or its wake does not work here
            if member.engine is not None:
                await self._end(name)
            del self._members[name]
            return dict.fromkeys(member.experts, error.message)
        for expert in refused:
            member.experts.pop(expert, None)
        return refused

    async def _rehearse(self, name: str) -> None:
        """One sleep and one wake, then the books: can every engine still have its turn?"""
        member = self._members[name]
        self._progress(f"rehearsing sleep and wake of the engine of {name}")
        awake = await member.running.device_memory()
        await self._sleep(name)
        asleep = await member.running.device_memory()
        await self._wake(name)
        if member.running.resident is not None:
            await member.running.prove(member.running.resident)
        if awake is None or asleep is None:
            return
        # Nobody could be asked before the first engine: all that is in use counts as its own.
        before = member.before or DeviceMemory(awake.total_bytes, awake.total_bytes)
        member.footprint = footprint(before, awake, asleep)
        known = {n: m.footprint for n, m in self._members.items() if m.footprint is not None}
        if short := shortfalls(awake.total_bytes, known):
            raise SwapFailed(
                name,
                "the device is too small for these engines in turn; missing bytes: "
                + ", ".join(f"{engine}: {missing}" for engine, missing in short.items()),
            )

    def shutdown(self) -> None:
        """Stop every engine's processes."""
        for member in self._members.values():
            if member.engine is not None:
                member.engine.shutdown()

    # --- residency --------------------------------------------------------------------------------

    @property
    def resident(self) -> str | None:
        """The expert whose weights the engine that is awake holds."""
        awake = self._awake()
        return None if awake is None else self._members[awake].running.resident

    @property
    def pooled(self) -> Mapping[str, Pooled]:
        """Experts whose weights have been loaded at least once by a running engine."""
        return {
            e: p for m in self._members.values() if m.engine for e, p in m.engine.pooled.items()
        }

    @property
    def in_pool(self) -> frozenset[str]:
        """Experts whose weights are in host memory now."""
        return frozenset(e for m in self._members.values() if m.engine for e in m.engine.in_pool)

    @property
    def pools(self) -> tuple[EnginePool, ...]:
        """Every running engine's part of the pool; one that is gone has none."""
        return tuple(
            EnginePool(
                m.group,
                m.settings.pool_bytes,
                m.engine.entry_bytes,
                tuple(m.experts),
                m.engine.in_pool,
            )
            for m in self._members.values()
            if m.engine is not None
        )

    @property
    def load_ms(self) -> float | None:
        """The slowest engine's newest load from disk into host memory; None: none was measured."""
        known = [m.engine.load_ms for m in self._members.values() if m.engine is not None]
        return max((ms for ms in known if ms is not None), default=None)

    @property
    def engine_of(self) -> Mapping[str, str]:
        """Expert -> the engine that runs it, named after its first expert."""
        return {expert: name for name, m in self._members.items() for expert in m.experts}

    @property
    def states(self) -> Mapping[str, EngineState]:
        return {name: member.state for name, member in self._members.items()}

    async def make_resident(self, expert: str, keep: Sequence[str] = ()) -> GroupReport:
        """Put ``expert`` into service on the device. Raises SwapFailed or CanaryMismatch.

        Nothing may generate. Cancelled, it still finishes the step under way.
        """
        name = self.engine_of.get(expert)
        if name is None:
            raise SwapFailed(expert, "not in the weight pool")
        working = asyncio.ensure_future(self._make_resident(expert, name, keep))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            await asyncio.wait({working})
            raise

    async def _make_resident(self, expert: str, name: str, keep: Sequence[str]) -> GroupReport:
        started = time.perf_counter()
        try:
            way = await self._turn_to(name, first=expert)
        except ArtifactError as error:
            raise SwapFailed(expert, error.message) from error
        except SwapFailed as error:
            raise SwapFailed(expert, error.reason) from error
        turn_ms = (time.perf_counter() - started) * 1e3
        engine = self._members[name].running
        try:
            if way == "wake" and engine.resident == expert:
                canary_ms = await engine.prove(expert)
                return GroupReport(
                    way, turn_ms, SwapReport(expert, "device", 0, 0.0, 0.0, canary_ms)
                )
            return GroupReport(way, turn_ms, await engine.make_resident(expert, keep))
        except CanaryMismatch:
            if way != "in_place":  # what else its wake or start has spoiled, nobody knows
                await self._end(name)
            raise

    async def _turn_to(self, wanted: str, *, first: str | None = None) -> str:
        """Step by step until ``wanted`` is awake; the dearest way that it took. ``first``: the
        expert to start the engine with, should it have to be started."""
        way = "in_place"
        while (step := next_step(self.states, wanted)) is not None:
            match step.action:
                case Action.SLEEP:
                    await self._put_to_sleep(step.engine)
                case Action.KILL:
                    await self._end(step.engine)
                case Action.WAKE:
                    way = "wake"
                    await self._wake(step.engine)
                case Action.START:
                    way = "start"
                    await self._start(step.engine, lazy=True, first=first)
        return way

    async def prefetch(self, expert: str, keep: Sequence[str] = ()) -> bool:
        """See ``SwappableEngine.prefetch``; False for an expert whose engine is not running."""
        name = self.engine_of.get(expert)
        engine = None if name is None else self._members[name].engine
        return engine is not None and await engine.prefetch(expert, keep)

    async def evict(self, expert: str) -> None:
        """See ``SwappableEngine.evict``. An engine that is gone has nothing to give up."""
        engine = self._member_of(expert).engine
        if engine is not None:
            await engine.evict(expert)

    # --- steps ------------------------------------------------------------------------------------

    def _awake(self) -> str | None:
        return next((n for n, m in self._members.items() if m.state is EngineState.AWAKE), None)

    async def _put_others_to_sleep(self, name: str) -> None:
        for other, member in self._members.items():
            if other != name and member.state is EngineState.AWAKE:
                await self._put_to_sleep(other)

    async def _put_to_sleep(self, name: str) -> None:
        """Or, failing that, to an end: either way its memory is free for the next."""
        try:
            await self._sleep(name)
        except SwapFailed as error:
            self._progress(error.message)

    async def _start(self, name: str, *, lazy: bool, first: str | None = None) -> dict[str, str]:
        """``lazy``: load only what is needed now; the others when they are asked for."""
        member = self._members[name]
        experts = member.experts
        if first is not None:
            experts = {first: experts[first], **experts}
        member.before = await self._device_memory()
        settings = member.settings
        if member.before is not None:
            settings = replace(settings, device_share=start_utilization(member.before))
        member.on(EngineEvent.START)
        try:
            member.engine, refused = await self._start_engine(
                experts, settings, progress=self._progress, lazy=lazy
            )
        except BaseException:
            member.on(EngineEvent.FAILED)
            raise
        member.on(EngineEvent.STARTED)
        return refused

    async def _device_memory(self) -> DeviceMemory | None:
        """As any engine sees it; before the first there is nobody to ask."""
        for member in self._members.values():
            if member.engine is not None:
                return await member.engine.device_memory()
        return None

    async def _sleep(self, name: str) -> None:
        """Raises SwapFailed, with the engine gone, when vLLM raises."""
        member = self._members[name]
        member.on(EngineEvent.SLEEP)
        try:
            await member.running.sleep()
        except Exception as error:
            await self._stop(member, EngineEvent.FAILED)
            raise SwapFailed(name, f"its engine could not be put to sleep: {error}") from error
        member.on(EngineEvent.SLEPT)

    async def _wake(self, name: str) -> None:
        """Raises SwapFailed, with the engine gone, when vLLM raises twice."""
        member = self._members[name]
        for left in reversed(range(_WAKES_MAX)):
            member.on(EngineEvent.WAKE)
            try:
                await self._all_back(member)
            # vLLM raises what the device raised; out of memory leaves the engine half awake.
            except Exception as error:
                member.on(EngineEvent.FAILED)
                if left == 0:
                    await self._end(name)
                    raise SwapFailed(name, f"its engine does not wake: {error}") from error
            else:
                member.on(EngineEvent.WOKE)
                return

    async def _all_back(self, member: _Member) -> None:
        if not await member.running.wake():
            raise HostLost(member.running.resident or "", "")

    async def _end(self, name: str) -> None:
        await self._stop(self._members[name], EngineEvent.ENDED)

    async def _stop(self, member: _Member, event: EngineEvent) -> None:
        """Its memory is free when this returns; stopping processes takes seconds."""
        member.on(event)
        engine, member.engine = member.engine, None
        if engine is not None:
            await asyncio.to_thread(engine.shutdown)

    # --- answering --------------------------------------------------------------------------------

    async def serve(
        self, expert: str, endpoint: Endpoint, body: Mapping[str, Any], *, request_id: str
    ) -> dict[str, Any] | AsyncIterator[str]:
        """See ``SwappableEngine.serve``. The expert must be resident."""
        return await self._member_of(expert).running.serve(
            expert, endpoint, body, request_id=request_id
        )

    def _member_of(self, expert: str) -> _Member:
        return self._members[self.engine_of[expert]]

    async def check_health(self) -> None:
        """Raise HostLost when the engine that is awake is dead. One that died in its sleep is
        forgotten, and started again when it is needed."""
        for name, member in self._members.items():
            if member.engine is None or member.state not in (EngineState.AWAKE, EngineState.ASLEEP):
                continue
            try:
                await member.engine.check_health()
            except HostLost:
                if member.state is EngineState.AWAKE:
                    raise
                await self._end(name)


def plan_members(
    experts: Mapping[str, str], settings: EngineSettings, engines_max: int
) -> tuple[dict[str, _Member], dict[str, str]]:
    """The engines to run, named after their first experts, and the experts refused, with reasons:
    those of architectures beyond ``engines_max``, or without room in the weight pool."""
    groups = engine_groups(experts)
    refused: dict[str, str] = {}
    for group in groups[engines_max:]:
        differences = folder_differences(experts[groups[0][0]], experts[group[0]])
        told = "; ".join(f"{key}: {what}" for key, what in differences.items())
        for expert in group:
            refused[expert] = (
                f"{expert} cannot share an engine with {groups[0][0]} ({told}), and the host runs "
                f"{engines_max} at most (engines_max)"
            )
    groups = groups[:engines_max]
    wide = 4 if settings.dtype == "float32" else None
    sizes = {
        group[0]: {e: weights_bytes(experts[e], element_bytes=wide) for e in group}
        for group in groups
    }
    shares = pool_shares(settings.pool_bytes, sizes)
    if len(groups) == 1:
        shares = dict.fromkeys(shares, settings.pool_bytes)  # its own worker says what is too small
    members: dict[str, _Member] = {}
    for group in groups:
        if shares[group[0]] == 0:
            refused |= dict.fromkeys(group, "host_memory_bytes has no room for its weights")
            continue
        own = replace(settings, pool_bytes=shares[group[0]], sleeps=len(groups) > 1)
        signature = architecture_digest(experts[group[0]])
        members[group[0]] = _Member({e: experts[e] for e in group}, own, signature)
    return members, refused
