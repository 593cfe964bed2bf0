"""Ray and the expert hosts of ``coe serve``: started in order, progress told, stopped again."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deployments.environment import REDIS_ENV
from gateway.config import Config
from gateway.start_failed import StartFailed

__all__ = ["HostNotes", "forget_progress", "start_hosts", "start_ray"]

_APP_NAME = "coe-experts"


def start_ray(stack: contextlib.ExitStack, restore_signals: Callable[[], None]) -> None:
    """A local cluster of our own on the loopback, or the one that RAY_ADDRESS names.

    ``restore_signals``: Ray's core puts a signal handler of its own in place, which aborts.
    """
    import ray
    from ray import serve as ray_serve

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    own = not os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {
        "include_dashboard": False,
        "object_store_memory": 100 * 2**20,
        "num_cpus": max(2, os.cpu_count() or 2),
        "_node_ip_address": "127.0.0.1",
    }
    try:
        ray.init(
            log_to_driver=False,
            logging_level="ERROR",
            namespace="coe",
            **(local if own else {}),
        )
    except ConnectionError as error:
        address = os.environ.get("RAY_ADDRESS", "a cluster of our own")
        raise StartFailed(
            f"Ray does not answer ({address}); correct or unset RAY_ADDRESS"
        ) from error
    finally:
        restore_signals()
    stack.callback(_stop_ray)
    ray_serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})


def _stop_ray() -> None:
    import ray
    from ray import serve as ray_serve

    try:
        ray_serve.delete(_APP_NAME, _blocking=True)
    except Exception as error:  # noqa: BLE001 - Ray names none; whatever is left is ended after us
        print(f"Ray did not stop the expert hosts in order: {error}", file=sys.stderr)
    ray.shutdown()


def start_hosts(
    path: Path, config: Config, stack: contextlib.ExitStack, note: Callable[[str], None]
) -> None:
    from ray import serve as ray_serve

    from deployments.app import build

    application = build({"config": str(path.absolute()), "advertise_host": _advertised()})
    failure: list[BaseException] = []

    def run() -> None:
        try:
            ray_serve.run(application, name=_APP_NAME, route_prefix=None)
        except BaseException as error:  # noqa: BLE001 - handed to the waiting thread
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    with HostNotes(os.environ[REDIS_ENV], [host.name for host in config.hosts]) as notes:
        while thread.is_alive():
            thread.join(timeout=0.5)
            for text in notes.fresh():
                note(text)
    if failure:
        raise StartFailed(f"the expert hosts did not start: {_serve_message(failure[0])}")


def _serve_message(error: BaseException) -> str:
    """What Serve knows of the failure: its own exception only names the deployment."""
    from ray import serve as ray_serve

    application = ray_serve.status().applications.get(_APP_NAME)
    messages = [d.message for d in application.deployments.values()] if application else []
    return " ".join(m for m in messages if m) or str(error)


def _advertised() -> str | None:
    return None if os.environ.get("RAY_ADDRESS") else "127.0.0.1"


class HostNotes:
    """What starting hosts say they are doing, read from the store."""

    def __init__(self, url: str, hosts: list[str]) -> None:
        import redis

        self._client = redis.Redis.from_url(
            url, socket_timeout=0.5, socket_connect_timeout=0.5, decode_responses=True
        )
        self._hosts = hosts
        self._seen: dict[str, str] = {}

    def __enter__(self) -> HostNotes:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def fresh(self) -> list[str]:
        """Notes that changed since the last call. An unreachable store only means no news."""
        import redis

        from deployments.registry import progress_key

        fresh: list[str] = []
        for host in self._hosts:
            with contextlib.suppress(redis.RedisError):
                text = str(self._client.get(progress_key(host)) or "")
                if text and self._seen.get(host) != text:
                    self._seen[host] = text
                    fresh.append(f"{host}: {text}")
        return fresh


def forget_progress(config: Config, url: str) -> None:
    """News of the last run's hosts is not news of this one's."""
    import redis

    from deployments.registry import progress_key

    with redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5) as client:
        for host in config.hosts:
            client.delete(progress_key(host.name))
