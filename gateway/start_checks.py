"""Looked at before anything is started: ports, memory, models. Each failure says what to do."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from deployments.host_config import HostConfig
from experts.compat import engine_groups, unreadable
from experts.types import SourceKind
from gateway.config import Config
from gateway.start_failed import StartFailed

__all__ = ["check_memory", "check_models", "listen", "listen_for_admins"]

_BASE_MEMORY_BYTES = 3 << 30  # Ray, store, gateway and the engine's own code


@contextlib.contextmanager
def listen(config: Config, host: str | None, port: int | None) -> Iterator[socket.socket]:
    """Take the port first: finding it in use after a minute of loading would be unkind.

    ``host`` and ``port`` stand before the configuration's.
    """
    where = host or config.gateway.host
    number = config.gateway.port if port is None else port
    with _listening(
        where, number, "coe serve --port 8080, with make: make serve SERVE_FLAGS='--port 8080'"
    ) as listener:
        yield listener


def listen_for_admins(
    config: Config, beside: socket.socket, stack: contextlib.ExitStack
) -> socket.socket | None:
    """The admin port. Its key is looked at here, so that a missing one is known at once."""
    gateway = config.gateway
    gateway.resolve_admin_key(os.environ)
    port = gateway.admin_port_beside(beside.getsockname()[1])
    if port is None:
        return None
    advice = "gateway.admin_port in the configuration (0: any free one; off: none)"
    return stack.enter_context(_listening(gateway.admin_host, port, advice))


@contextlib.contextmanager
def _listening(host: str, port: int, advice: str) -> Iterator[socket.socket]:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise StartFailed(
            f"port {port} on {host} cannot be used ({os.strerror(error.errno or 0).lower()}). "
            f"Stop what listens there (ss -ltnp shows it), or choose another: {advice}"
        ) from error
    listener.listen(1024)
    listener.set_inheritable(True)
    try:
        yield listener
    finally:
        listener.close()


def check_memory(config: Config) -> None:
    needed = sum(_host_bytes(config, host) for host in config.hosts if host.engine.device != "cuda")
    needed += _BASE_MEMORY_BYTES if needed else 0
    available = psutil.virtual_memory().available
    if needed > available:
        raise StartFailed(
            f"too little memory: about {needed / 2**30:.1f} GiB are needed, "
            f"{available / 2**30:.1f} GiB are free. Close other programs, serve fewer experts, or "
            "lower hosts[].engine.kv_cache_bytes in the configuration"
        )


def _host_bytes(config: Config, host: HostConfig) -> int:
    """What a host on this machine takes: the pool, one expert being read, and for each engine an
    expert and its cache. (Engines that sleep keep their memory where it is the machine's own.)"""
    folders = {name: config.catalogue.get(name).location for name in host.experts}
    weights = {name: _weight_bytes(Path(folder)) for name, folder in folders.items()}
    weights = {name: size for name, size in weights.items() if size}
    if not weights:
        return 0
    damaged = unreadable(folders)
    sound = {name: folder for name, folder in folders.items() if name not in damaged}
    groups = engine_groups(sound)[: host.engines_max] or [list(weights)]
    engines = sum(max(weights[e] for e in g) + host.engine.kv_cache_bytes for g in groups)
    pool = min(sum(weights.values()), host.pool.host_memory_bytes)
    return pool + max(weights.values()) + engines


def _weight_bytes(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) if folder.is_dir() else 0


def check_models(config: Config) -> None:
    """Local folders only: a hub id is fetched by the host."""
    missing = [
        spec
        for spec in config.catalogue.specs
        if spec.kind is SourceKind.WEIGHTS
        and Path(spec.location).is_absolute()
        and not (Path(spec.location) / "config.json").is_file()
    ]
    for spec in missing:
        print(f"        expert {spec.id!r}: no model in {spec.location}", file=sys.stderr)
    local = [
        s
        for s in config.catalogue.specs
        if s.kind is SourceKind.WEIGHTS and Path(s.location).is_absolute()
    ]
    if missing and len(missing) == len(local):
        raise StartFailed(
            "no expert has its weights. For the quickstart run `make models`; otherwise correct "
            "experts.<id>.source.path"
        )
