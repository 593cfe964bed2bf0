"""How a worker serves: the settings of its HTTP server and of its garbage collector.

Both apply to every process that serves a gateway, measured ones included.
"""

from __future__ import annotations

import gc

import uvicorn
from starlette.types import ASGIApp

from gateway.http_protocol import ConnectionLimits, protocol_with

__all__ = ["server_config", "spare_what_was_loaded"]

DRAIN_S = 8
_COLLECT_EVERY = (20_000, 50, 100)


def server_config(app: ASGIApp, limits: ConnectionLimits) -> uvicorn.Config:
    """uvicorn with bounded connections. Peers' forwarding headers are not looked at."""
    protocol = protocol_with(limits)
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=DRAIN_S,
        timeout_keep_alive=limits.keep_alive_s,
        http=protocol,
        ws="none",
        loop="uvloop",
        server_header=False,
        proxy_headers=False,
    )


def spare_what_was_loaded() -> None:
    """Call when everything is loaded, before serving.

    Some 150,000 objects live as long as the process; looking through them in every full collection
    would stop the loop, and each stream on it, for a tenth of a second. Of the rest nearly all go
    by their reference count; with a young generation of 700, the default, much of the time of a
    request goes into searching live requests for cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_EVERY)
