"""One expert host: an accelerator slot with its engine, weight pool, scheduler, port and heartbeat.

Owns everything about one slot and runs in one process (a Ray Serve replica, usually). It needs no
Ray: ``deployments.app`` wraps it, tests run it bare.

Life: start the engine and pool the experts, start the slot's driver, open the port, register. The
record in the store carries a heartbeat; when the process dies, the record expires and the gateway
stops asking. A host whose engine died says so by failing its health check and is replaced whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Protocol

import uvicorn

from deployments.host_config import HostConfig
from deployments.host_http import HostPort, ServingEngine
from deployments.host_record import PoolRecord
from deployments.host_tracing import HostSpans
from deployments.registry import HostRecord, HostRegistry
from deployments.swap.driver import SlotDriver, SwapReport
from experts.compat import resolve_model_folder
from experts.engine_group import EngineGroup
from experts.errors import ArtifactError, CoeError, StateUnavailable
from experts.tracing import Tracing, open_tracing
from experts.types import AnswerParsers
from experts.vllm_engine import EngineSettings

log = logging.getLogger(__name__)

HEARTBEAT_MS = 100  # the choice of host is as good as what it knows of queues
HEARTBEAT_TTL_MS = 3_000
BODY_BYTES_MAX = 8 << 20


class HostEngine(ServingEngine, Protocol):
    """An engine as a host uses it."""

    @property
    def resident(self) -> str | None: ...

    async def make_resident(self, expert: str) -> object: ...

    async def check_health(self) -> None: ...

    def shutdown(self) -> None: ...


class EngineActuator:
    """Lets the slot's driver move weights; turns the engine's report into the scheduler's."""

    def __init__(self, engine: EngineGroup) -> None:
        self._engine = engine

    async def make_resident(self, expert: str) -> SwapReport:
        report = await self._engine.make_resident(expert)
        swap = report.swap
        log.info(
            "swapped",
            extra={
                "expert": expert,
                "way": report.way,
                "source": swap.source,
                "turn_ms": round(report.turn_ms, 1),
                "swap_ms": round(swap.swap_ms, 1),
                "canary_ms": round(swap.canary_ms, 1),
            },
        )
        return SwapReport(
            expert=expert,
            copy_ms=swap.swap_ms,
            canary_ms=swap.canary_ms,
            bytes=swap.bytes,
            way=report.way,
            turn_ms=report.turn_ms,
        )


class ExpertHost:
    """See the module's docstring. ``locations`` maps each expert of this host to its weights,
    ``parsers`` those whose answers are parsed to how.
    """

    def __init__(
        self,
        *,
        host_id: str,
        config: HostConfig,
        locations: Mapping[str, str],
        parsers: Mapping[str, AnswerParsers] | None = None,
        registry: HostRegistry,
        token: str,
        advertise_host: str = "127.0.0.1",
        bind_host: str = "127.0.0.1",
        version: str = "",
        progress: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self.host_id = host_id
        self._config = config
        self._locations = locations
        self._parsers = parsers or {}
        self._registry = registry
        self._token = token
        self._advertise_host = advertise_host
        self._bind_host = bind_host
        self._version = version
        self._progress = progress
        self._engine: EngineGroup | None = None
        self._driver: SlotDriver | None = None
        self._server: uvicorn.Server | None = None
        self._tracing: Tracing | None = None
        self._serving: asyncio.Task[None] | None = None
        self._heartbeat: asyncio.Task[None] | None = None
        self._out_of_service: dict[str, str] = {}
        self._started_ms = 0
        self._url = ""
        self._changed = asyncio.Event()

    @property
    def url(self) -> str:
        return self._url

    @property
    def driver(self) -> SlotDriver:
        assert self._driver is not None, "the host is not started"
        return self._driver

    @property
    def engine(self) -> EngineGroup:
        assert self._engine is not None, "the host is not started"
        return self._engine

    async def start(self) -> None:
        """Bring the slot into service. Raises ArtifactError when no expert could be loaded."""
        self._started_ms = int(time.time() * 1000)
        await self._start_engine()
        await self._start_driver()
        await self._open_port()
        await self._publish()
        self._heartbeat = asyncio.create_task(self._heartbeats())

    async def _start_engine(self) -> None:
        folders: dict[str, str] = {}
        for expert, location in self._locations.items():
            try:
                folders[expert] = str(await asyncio.to_thread(resolve_model_folder, location))
            except ArtifactError as error:
                self._set_aside(expert, error.message)
        if not folders:
            raise ArtifactError(self._config.name, "no expert of this host has weights to load")
        notes: asyncio.Queue[str] = asyncio.Queue()
        reporter = asyncio.create_task(self._report(notes))
        try:
            self._engine, refused = await EngineGroup.start(
                folders,
                _engine_settings(self._config, self._parsers),
                engines_max=self._config.engines_max,
                progress=notes.put_nowait,
            )
        finally:
            reporter.cancel()
        for expert, reason in refused.items():
            self._set_aside(expert, reason)

    def _set_aside(self, expert: str, reason: str) -> None:
        log.error("expert out of service", extra={"expert": expert, "reason": reason})
        self._out_of_service[expert] = reason

    async def _report(self, notes: asyncio.Queue[str]) -> None:
        while True:
            note = await notes.get()
            log.info(note)
            if self._progress is not None:
                await self._progress(note)

    async def _start_driver(self) -> None:
        self._driver = SlotDriver(
            self._config.scheduler.config(),
            tuple(self._locations),
            EngineActuator(self.engine),
            clock=lambda: time.monotonic() * 1000,
            resident=self.engine.resident,
            engines=self.engine.engine_of,
            prefetcher=self.engine,
        )
        self._driver.on_change = self._changed.set
        await self._driver.start()
        for expert, reason in self._out_of_service.items():
            self._driver.retire(expert, reason)

    async def _open_port(self) -> None:
        self._tracing = open_tracing("coe-host", os.environ)
        tracer = None if self._tracing is None else self._tracing.tracer
        port = HostPort(
            host_id=self.host_id,
            engine=self.engine,
            driver=self.driver,
            experts=tuple(self._locations),
            token=self._token,
            body_bytes_max=BODY_BYTES_MAX,
            spans=HostSpans(tracer, self.host_id),
        )
        listener = socket.create_server((self._bind_host, self._config.port))
        self._url = f"http://{self._advertise_host}:{listener.getsockname()[1]}"
        self._server = _EmbeddedServer(
            uvicorn.Config(
                port.app(health=self._check_slot),
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=5,
            )
        )
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))

    # --- heartbeat --------------------------------------------------------------------------------

    async def _heartbeats(self) -> None:
        """Ends by the engine's error, with the host out of the registry, when the engine dies."""
        while True:
            self._changed.clear()
            try:
                await self._check_slot()
            except CoeError:
                log.exception("the slot cannot serve any more; leaving the registry")
                await self._withdraw()
                raise
            await self._publish()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), HEARTBEAT_MS / 1000)
            await asyncio.sleep(0.02)  # bursts of changes become one write

    async def _publish(self) -> None:
        # Away now, back later: the driver and open streams do not depend on the store.
        with contextlib.suppress(StateUnavailable):
            await self._registry.publish(self.record(), HEARTBEAT_TTL_MS)

    async def _withdraw(self) -> None:
        with contextlib.suppress(StateUnavailable):  # then the record expires by itself
            await self._registry.remove(self.host_id)

    def record(self) -> HostRecord:
        """What the gateway needs to choose between hosts, as of now."""
        snapshot = self.driver.snapshot()
        return HostRecord(
            host_id=self.host_id,
            url=self._url,
            experts=tuple(self._locations),
            resident=snapshot.resident,
            queue_depths=snapshot.queued,
            in_flight=snapshot.in_flight,
            swap_ms=snapshot.swap_ms,
            out_of_service=snapshot.out_of_service,
            slot_state=snapshot.phase.value,
            heartbeat_ms=int(time.time() * 1000),
            started_ms=self._started_ms,
            version=self._version,
            queued_request_ms=(snapshot.service_ms or 0.0) / snapshot.in_flight_max,
            pools=self._pools(),
            work={e: (w.begun, round(w.busy_ms)) for e, w in self.driver.work().items()},
            load_ms=round(self.engine.load_ms or 0.0, 1),
            moving=self.driver.loading.moving,
        )

    def _pools(self) -> tuple[PoolRecord, ...]:
        return tuple(
            PoolRecord(
                group=pool.group,
                limit_bytes=pool.limit_bytes,
                entry_bytes=pool.entry_bytes,
                experts=pool.experts,
                pooled=tuple(sorted(pool.pooled)),
            )
            for pool in self.engine.pools
        )

    async def check_health(self) -> None:
        """Raise when the slot cannot serve any more and the process should be replaced."""
        await self._check_slot()
        for task in (self._serving, self._heartbeat):
            if task is not None and task.done():
                task.result()
                raise RuntimeError("a host task ended")

    async def _check_slot(self) -> None:
        """Raises HostLost when the engine is dead or a swap hangs."""
        await self.engine.check_health()
        self.driver.check_health()

    async def aclose(self) -> None:
        """Leave the registry, refuse what waits, close the port, stop the engine."""
        if self._heartbeat is not None:  # first, or it would register the host again
            self._heartbeat.cancel()
            await asyncio.gather(self._heartbeat, return_exceptions=True)
        await self._withdraw()
        if self._driver is not None:
            await self._driver.aclose()
        if self._server is not None and self._serving is not None:
            self._server.should_exit = True
            await asyncio.gather(self._serving, return_exceptions=True)
        if self._tracing is not None:
            await self._tracing.aclose()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.shutdown)


class _EmbeddedServer(uvicorn.Server):
    """A server inside somebody else's process: signals belong to the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _engine_settings(config: HostConfig, parsers: Mapping[str, AnswerParsers]) -> EngineSettings:
    settings = EngineSettings(
        dtype=config.engine.dtype,
        max_model_len=config.engine.max_model_len,
        kv_cache_bytes=config.engine.kv_cache_bytes,
        max_num_seqs=config.engine.max_num_seqs,
        tensor_parallel=config.engine.tensor_parallel,
        pool_bytes=config.pool.host_memory_bytes,
        canary_enabled=config.canary.enabled,
        parsers=parsers,
    )
    if config.canary.prompt:
        import dataclasses

        settings = dataclasses.replace(settings, canary_prompt=config.canary.prompt)
    return settings
