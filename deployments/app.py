"""The expert hosts as an ordinary Ray Serve application.

``build`` is what a Serve config file names as ``import_path`` (see the YAML files beside this one)
and what ``coe serve`` runs locally. Serve places one replica per host, restarts it when its health
check fails, and rolls updates. Requests do not go through Serve: each replica opens its own port
and registers it, and tokens stream from there to the gateway directly.

Secrets and the store's address come from the environment of the Ray processes (``COE_HOST_TOKEN``,
``COE_REDIS_URL``), never from the application's arguments, which Serve shows in its status.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import Any

from ray import serve

from deployments.environment import REDIS_ENV, TOKEN_ENV
from deployments.host_config import HostConfig
from deployments.host_plan import HostPlan, load_hosts
from experts.errors import ConfigError, StateUnavailable
from experts.types import AnswerParsers

log = logging.getLogger(__name__)

MAX_ONGOING_REQUESTS = 16  # only control calls come through Serve


class ExpertHostReplica:
    """The Serve side of one ``ExpertHost``: construct, watch, stop."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        config: HostConfig,
        locations: dict[str, str],
        parsers: dict[str, AnswerParsers],
        advertise_host: str | None,
        version: str,
    ) -> None:
        from deployments.host import ExpertHost
        from deployments.registry import HostRegistry
        from deployments.store import StateStore

        logging.basicConfig(level=logging.INFO)
        self._store = StateStore(_required_env(REDIS_ENV, config.name))
        address = advertise_host or _own_address()
        self._host = ExpertHost(
            host_id=f"{config.name}-{os.getpid()}@{address}",
            config=config,
            locations=locations,
            parsers=parsers,
            registry=HostRegistry(self._store),
            token=_required_env(TOKEN_ENV, config.name),
            advertise_host=address,
            bind_host="127.0.0.1" if address == "127.0.0.1" else "0.0.0.0",
            version=version,
            progress=_progress_writer(self._store, config.name),
        )
        try:
            await self._host.start()
        except BaseException:
            await self._host.aclose()  # the engine must not outlive a start that failed
            raise

    async def check_health(self) -> None:
        await self._host.check_health()

    async def status(self) -> dict[str, Any]:
        """The host's present record, for operators and tests."""
        from deployments.host_record import encode_record

        return encode_record(self._host.record())

    async def __call__(self) -> str:
        return self._host.url

    async def __del__(self) -> None:
        """Serve awaits this on graceful shutdown; the engine of a killed replica ends by itself."""
        host = getattr(self, "_host", None)
        if host is not None:
            await host.aclose()
            await self._store.aclose()


def _progress_writer(store: Any, host_name: str) -> Any:
    from deployments.registry import publish_progress

    async def write(note: str) -> None:
        with contextlib.suppress(StateUnavailable):  # news only; the start goes on without
            await publish_progress(store, host_name, note)

    return write


def _required_env(name: str, host: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise ConfigError(
            "environment", None, name, f"host {host!r} needs it; set it where Ray starts"
        )
    return value


def _own_address() -> str:
    import ray

    address: str = ray.util.get_node_ip_address()
    return address


def deployment_for(plan: HostPlan, *, advertise_host: str | None, version: str) -> Any:
    """One Serve deployment for one host of the configuration."""
    config = plan.config
    gpus = 0 if config.engine.device == "cpu" else config.engine.tensor_parallel
    if config.engine.device == "auto":
        gpus = config.engine.tensor_parallel if _cluster_has_gpus() else 0
    return serve.deployment(
        ExpertHostReplica,
        name=f"expert-host-{config.name}",
        num_replicas=1,
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": 0.5, "num_gpus": gpus},
        health_check_period_s=2,
        health_check_timeout_s=20,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=10,
        max_constructor_retry_count=2,
    ).bind(config, plan.locations, plan.parsers, advertise_host, version)


def _cluster_has_gpus() -> bool:
    import ray

    return bool(ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0)


@serve.deployment(name="expert-hosts", num_replicas=1, ray_actor_options={"num_cpus": 0})
class HostGroup:
    """Holds all hosts of one application together; answers which they are."""

    def __init__(self, *hosts: Any) -> None:
        self._hosts = hosts

    async def __call__(self) -> list[str]:
        return list(await asyncio.gather(*[host.remote() for host in self._hosts]))


def build(args: dict[str, Any]) -> Any:
    """Serve application builder. ``args``: ``config`` (path of coe.yaml), optional ``hosts``
    (names), optional ``advertise_host``.
    """
    path = Path(args.get("config", ""))
    if not args.get("config"):
        raise ConfigError("serve arguments", None, "config", "name the coe.yaml to serve")
    plan = load_hosts(path)
    names = [host.config.name for host in plan]
    wanted = args.get("hosts") or names
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise ConfigError(str(path), None, "hosts", f"no host is named {', '.join(unknown)}")
    hosts = [
        deployment_for(
            host, advertise_host=args.get("advertise_host"), version=args.get("version", "")
        )
        for host in plan
        if host.config.name in wanted
    ]
    return hosts[0] if len(hosts) == 1 else HostGroup.bind(*hosts)  # type: ignore[attr-defined]
