"""The state store of ``coe serve``: the one that the configuration names, or one of its own."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from deployments.environment import REDIS_ENV
from gateway.config import Config
from gateway.run_files import AlreadyRunning, claimed_data_folder, noted_store
from gateway.start_failed import StartFailed

__all__ = ["EmbeddedStore", "start_store"]


class EmbeddedStore:
    """The store that we started ourselves; restarted in place when it dies."""

    def __init__(self, data_dir: Path) -> None:
        from deployments.embedded_valkey import EmbeddedValkey

        self._server = EmbeddedValkey(data_dir=data_dir)
        self._server.start()
        self._server.wait_ready(timeout_s=10)

    @property
    def url(self) -> str:
        return self._server.url

    def keep_alive(self) -> None:
        if not self._server.alive:
            print("the embedded state store ended; starting it again", file=sys.stderr)
            self._server.start()

    def stop(self) -> None:
        self._server.stop()


def start_store(config: Config, stack: contextlib.ExitStack) -> EmbeddedStore | None:
    url = config.state.resolve_redis_url(os.environ)
    if url is not None:
        os.environ[REDIS_ENV] = url
        return None
    store = EmbeddedStore(_data_folder(config, stack))
    stack.callback(store.stop)
    os.environ[REDIS_ENV] = store.url
    try:
        stack.enter_context(noted_store(config.path, store.url, os.environ))
    except OSError as error:
        print(f"note: `coe keys` will not find this store ({error})", file=sys.stderr)
    return store


def _data_folder(config: Config, stack: contextlib.ExitStack) -> Path:
    """Keys, budgets and decisions outlive a restart there. Raises StartFailed."""
    try:
        return stack.enter_context(claimed_data_folder(config.path, os.environ))
    except AlreadyRunning as error:
        raise StartFailed(
            f"another `coe serve` runs with {config.path} and holds its data in {error}. Stop it, "
            "or name a store that both share in state.redis_url"
        ) from error
    except OSError as error:
        raise StartFailed(
            f"the state store's data folder cannot be used: {error}. Set XDG_STATE_HOME to a "
            "folder that can be written, or name a store of your own in state.redis_url"
        ) from error
