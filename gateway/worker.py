"""One gateway process: ``python -m gateway.worker <fd of the socket> [<fd of the admin socket>]``.

Started by the supervisor; configuration, store and token come by environment, so that no secret
shows in a process list.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from deployments.environment import REDIS_ENV
from experts.errors import CoeError
from gateway.config import Config, default_config_path, load_config
from gateway.http_protocol import ConnectionLimits
from gateway.serving import server_config, spare_what_was_loaded
from gateway.telemetry import JsonFormatter
from gateway.wiring import Parts, admin_application, application, open_parts
from gateway.worker_processes import READY_FD_ENV


async def run(
    listener: socket.socket,
    config_path: Path,
    redis_url: str,
    admin_listener: socket.socket | None = None,
) -> None:
    """Serve until a signal; then finish what is running, for a bounded time."""
    config = load_config(config_path)
    async with open_parts(config, redis_url) as parts:
        server = uvicorn.Server(_server_config(application(parts), config))
        spare_what_was_loaded()
        _leave_when_relieved(server, config)
        async with _beside(admin_listener, parts):
            _say_ready()
            await server.serve(sockets=[listener])


def _leave_when_relieved(server: uvicorn.Server, config: Config) -> None:
    """Another worker has taken over: accept nothing more, and finish what has begun."""

    def leave() -> None:
        server.config.timeout_graceful_shutdown = config.gateway.limits.request_timeout_ms // 1000
        server.should_exit = True

    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, leave)


def _say_ready() -> None:
    """To whoever started us and waits for it. Connections made from now on are answered."""
    if (descriptor := os.environ.pop(READY_FD_ENV, None)) is not None:
        os.write(int(descriptor), b"1")
        os.close(int(descriptor))


@contextlib.asynccontextmanager
async def _beside(listener: socket.socket | None, parts: Parts) -> AsyncIterator[None]:
    """The admin port, where this is the worker that has it."""
    if listener is None:
        yield
        return
    key = parts.config.gateway.resolve_admin_key(os.environ)
    server = _BesideServer(_server_config(admin_application(parts, key), parts.config))
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="admin-port")
    try:
        yield
    finally:
        server.should_exit = True
        await serving


class _BesideServer(uvicorn.Server):
    """A second server in the same loop: signals are the first one's business."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server_config(app: FastAPI, config: Config) -> uvicorn.Config:
    limits = config.gateway.limits
    return server_config(
        app,
        ConnectionLimits(
            header_bytes=limits.header_bytes,
            header_timeout_ms=limits.header_timeout_ms,
            body_timeout_ms=limits.body_timeout_ms,
            stalled_write_ms=limits.stalled_write_ms,
            connections=limits.connections,
        ),
    )


def _leave(_number: int, _frame: object) -> None:
    raise SystemExit(0)


def main(arguments: list[str]) -> int:
    _log_as_json()
    # uvicorn raises the signal again when it has drained, and the default action would end the
    # process there and then, with decisions still to be written.
    signal.signal(signal.SIGTERM, _leave)
    listener, *admin = (socket.socket(fileno=int(number)) for number in arguments)
    try:
        with asyncio.Runner(loop_factory=_new_loop) as runner:
            runner.run(run(listener, default_config_path(), os.environ[REDIS_ENV], *admin))
    except CoeError as error:
        print(f"coe gateway: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def _new_loop() -> asyncio.AbstractEventLoop:
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def _log_as_json() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    level = os.environ.get("COE_LOG_LEVEL", "WARNING").upper()
    logging.basicConfig(level=level, handlers=[handler], force=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
