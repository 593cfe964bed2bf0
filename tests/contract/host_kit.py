"""An expert host's port over a real slot driver and an engine that plays scripts."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from deployments.host_http import HostPort
from deployments.swap.config import SchedulerConfig
from deployments.swap.driver import SlotDriver, SwapReport
from experts.engine_group import EnginePool
from experts.errors import HostLost, InvalidRequest
from experts.types import Endpoint

TOKEN = "host-secret"
BODY_BYTES_MAX = 10_000
QUICK = SchedulerConfig(
    age_bound_ms=20,
    min_residency_ms=0,
    drain_deadline_ms=40,
    swap_timeout_ms=2_000,
    queue_wait_ms_max=120_000,
)
PATIENT = SchedulerConfig(age_bound_ms=60_000, min_residency_ms=0, drain_deadline_ms=60_000)


def sse(body: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def token(text: str, finish: str | None = None) -> str:
    return sse({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]})


class ScriptedEngine:
    """An engine with one slot that does what ``body["script"]`` says, step by step.

    ``wait`` stops until ``go`` is set; ``die`` raises HostLost; ``400`` and ``500`` are error
    events as vLLM writes them; anything else is a token. A whole answer is made of its tokens.
    """

    def __init__(self) -> None:
        self.resident: str | None = None
        self.running: list[str] = []
        self.calls: list[str] = []
        self.swaps: list[str] = []
        self.aborted: list[str] = []
        self.go = asyncio.Event()
        self.dead = False
        self.swallows_cancellation = False

    # --- as the slot's actuator

    async def make_resident(self, expert: str) -> SwapReport:
        assert self.running == [], "a swap under a running generation"
        self.swaps.append(expert)
        await asyncio.sleep(0.002)
        self.resident = expert
        return SwapReport(expert, 2.0, 0.0, 1)

    async def check_health(self) -> None:
        if self.dead:
            raise HostLost("", "")

    # --- as the port's engine

    async def serve(
        self, expert: str, endpoint: Endpoint, body: Mapping[str, Any], *, request_id: str
    ) -> dict[str, Any] | AsyncIterator[str]:
        assert self.resident == expert, "generating with another expert's weights"
        self.calls.append(expert)
        if body.get("script") == "invalid":
            raise InvalidRequest("temperature", "must not be negative")
        events = self._events(expert, tuple(body.get("script", ("hello",))))
        if body.get("stream"):
            return events
        return await self._whole(events)

    async def _events(self, expert: str, script: tuple[str, ...]) -> AsyncGenerator[str, None]:
        self.running.append(expert)
        try:
            for step in script:
                if step == "wait":
                    await self.go.wait()
                elif step == "die":
                    raise HostLost(expert, "")
                elif step in ("400", "500"):
                    yield sse({"error": {"message": "so sorry", "param": "n", "code": int(step)}})
                else:
                    yield token(step)
            yield token("", "stop")
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(expert)
            raise
        finally:
            self.running.remove(expert)

    async def _whole(self, events: AsyncGenerator[str, None]) -> dict[str, Any]:
        try:
            told = [json.loads(event[6:]) async for event in events if "[DONE]" not in event]
        except asyncio.CancelledError:
            if self.swallows_cancellation:  # as vLLM's serving layer does
                raise InvalidRequest(None, "Client disconnected") from None
            raise
        text = "".join(part["choices"][0]["delta"]["content"] for part in told)
        return {"choices": [{"message": {"role": "assistant", "content": text}}]}


class PooledEngine(ScriptedEngine):
    """As ``EngineGroup`` is to its host: one engine for a and b, with room for ``places``."""

    engine_of: Mapping[str, str] = {"a": "a", "b": "a"}

    def __init__(self, pooled: str = "ab", places: int = 10) -> None:
        super().__init__()
        self.in_pool = frozenset(pooled)
        self.places = places
        self.stopped = 0
        self.load_ms: float | None = None

    @property
    def pools(self) -> tuple[EnginePool, ...]:
        return (EnginePool("arch", 10 * self.places, 10, ("a", "b"), self.in_pool),)

    async def prefetch(self, expert: str, keep: Sequence[str]) -> bool:
        await asyncio.sleep(0.005)
        if len(self.in_pool) >= self.places:
            return False
        self.in_pool |= {expert}
        return True

    async def evict(self, expert: str) -> None:
        self.in_pool -= {expert}

    def shutdown(self) -> None:
        self.stopped += 1


class Slot:
    """A driver, its engine, and the port over both. ``clock`` tells milliseconds."""

    def __init__(
        self,
        config: SchedulerConfig,
        clock: Callable[[], float] = lambda: time.monotonic() * 1000,
    ) -> None:
        self.engine = ScriptedEngine()
        self.driver = SlotDriver(config, ("a", "b"), self.engine, clock=clock)
        port = HostPort(
            host_id="host-1",
            engine=self.engine,
            driver=self.driver,
            experts=("a", "b"),
            token=TOKEN,
            body_bytes_max=BODY_BYTES_MAX,
        )
        self.app = port.app(health=self.engine.check_health)

    def at_rest(self) -> bool:
        shown = self.driver.snapshot()
        return not self.engine.running and not shown.in_flight and not shown.queued
