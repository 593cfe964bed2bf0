"""One gateway process: ``python -m gateway.worker <fd of the listening socket>``.

Started by the supervisor; configuration, store and token come by environment, so that no secret
shows in a process list.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import uvicorn

from deployments.environment import REDIS_ENV
from experts.errors import CoeError
from gateway.config import default_config_path, load_config
from gateway.telemetry import JsonFormatter
from gateway.wiring import application, open_parts

_DRAIN_S = 8


async def run(listener: socket.socket, config_path: Path, redis_url: str) -> None:
    """Serve until a signal; then finish what is running, for a bounded time."""
    async with open_parts(load_config(config_path), redis_url) as parts:
        server = uvicorn.Server(
            uvicorn.Config(
                application(parts),
                log_level="warning",
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=_DRAIN_S,
                http="httptools",
                loop="uvloop",
                server_header=False,
            )
        )
        await server.serve(sockets=[listener])


def _leave(_number: int, _frame: object) -> None:
    raise SystemExit(0)


def main(arguments: list[str]) -> int:
    _log_as_json()
    # uvicorn raises the signal again when it has drained, and the default action would end the
    # process there and then, with decisions still to be written.
    signal.signal(signal.SIGTERM, _leave)
    listener = socket.socket(fileno=int(arguments[0]))
    try:
        with asyncio.Runner(loop_factory=_new_loop) as runner:
            runner.run(run(listener, default_config_path(), os.environ[REDIS_ENV]))
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
