"""SIGUSR1 to ``coe serve``: take over a changed coe.yaml without losing a request.

New workers read the file; when all of them can serve, the old ones finish what they have begun and
end. So experts, prices, limits, the router and everything else that a gateway reads can change
while it serves. What was opened before the workers (sockets, the store, hosts) cannot.
"""

from __future__ import annotations

import sys
from pathlib import Path

from experts.errors import ConfigError
from gateway.config import Config, load_config
from gateway.start_failed import StartFailed
from gateway.worker_processes import Workers

__all__ = ["needs_restart", "reloaded"]


def needs_restart(old: Config, new: Config) -> tuple[str, ...]:
    """Keys of coe.yaml that changed and are read at the start only. Pure."""
    before, after = old.gateway, new.gateway
    changed = {
        "hosts": old.hosts != new.hosts,
        "state": old.state != new.state,
        "telemetry": old.telemetry != new.telemetry,
        "gateway.host": before.host != after.host,
        "gateway.port": before.port != after.port,
        "gateway.workers": before.workers != after.workers,
        "gateway.admin_host": before.admin_host != after.admin_host,
        "gateway.admin_port": before.admin_port != after.admin_port,
        "gateway.host_token": before.host_token != after.host_token,
    }
    return tuple(key for key, differs in changed.items() if differs)


def reloaded(config: Config, path: Path, workers: Workers) -> Config:
    """The configuration in force afterwards: the file's, or ``config`` when that cannot be.

    Says on standard error what came of it; a bad file never disturbs who serves.
    """
    try:
        fresh = load_config(path)
        if keys := needs_restart(config, fresh):
            raise StartFailed(f"{', '.join(keys)} cannot change while it serves; restart for that")
        workers.relieve()
    except (ConfigError, StartFailed) as error:
        print(f"coe serve: {path} was not taken over: {error}", file=sys.stderr, flush=True)
        return config
    print(
        f"coe serve: {path} was taken over; experts: {', '.join(fresh.catalogue.ids)}",
        file=sys.stderr,
        flush=True,
    )
    return fresh
