"""``coe serve``: bring everything up in order, watch it, take everything down.

Order: look before starting (config, ports, memory, models), then state store, Ray, expert hosts,
gateway workers. Whatever fails says what to do, and what was started before it is stopped again.
The supervisor itself serves nothing: workers and hosts are processes of their own, so that no slow
start and no crash of one touches another.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from deployments.environment import CONFIG_ENV, REDIS_ENV, TOKEN_ENV
from deployments.host_config import HostConfig
from experts.compat import engine_groups, unreadable
from experts.errors import CoeError, ConfigError
from experts.tracing import tracing_wanted
from experts.types import SourceKind
from gateway.config import Config, load_config
from gateway.process_tree import (
    adopt_orphans,
    bury_orphans,
    child_pids,
    end_descendants,
)
from gateway.progress import Progress
from gateway.run_files import AlreadyRunning, claimed_data_folder, noted_store
from gateway.start_failed import StartFailed
from gateway.worker_processes import Workers

STEPS = 5
_APP_NAME = "coe-experts"
_BASE_MEMORY_BYTES = 3 << 30  # Ray, store, gateway and the engine's own code


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The command line of ``coe serve``; None means "as the configuration says"."""

    config: Path
    host: str | None = None
    port: int | None = None
    workers: int | None = None


def serve(options: ServeOptions) -> int:
    """Run until SIGINT or SIGTERM. Returns the process's exit status."""
    stop = threading.Event()
    _on_signals(stop)
    adopt_orphans()
    progress = Progress(STEPS)
    status = 0
    left: list[int] = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: left.append(_end_leftovers()))
        try:
            _start_and_watch(options, progress, stack, stop)
        except Interrupted:
            pass
        except (StartFailed, CoeError) as error:
            print(f"coe serve: {error}", file=sys.stderr)
            status = 1
        finally:
            stop.set()  # from here on a signal must not interrupt the clean-up
        if status == 0 or progress.elapsed_s > 5:
            print("\nstopping …", file=sys.stderr, flush=True)
    if sum(left):
        print(f"stopped, but {sum(left)} processes would not end", file=sys.stderr)
        return 1
    print("stopped; no process is left behind", file=sys.stderr)
    return status


class Interrupted(BaseException):
    """A signal came while something was starting. Not an Exception: it may strike inside a library
    that catches those, and the start would go on.
    """


def _on_signals(stop: threading.Event) -> None:
    def handle(_number: int, _frame: object) -> None:
        if not stop.is_set():
            stop.set()
            raise Interrupted

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)


def _end_leftovers() -> int:
    return end_descendants(grace_s=5, report=lambda text: print(text, file=sys.stderr))


def _start_and_watch(
    options: ServeOptions,
    progress: Progress,
    stack: contextlib.ExitStack,
    stop: threading.Event,
) -> None:
    with progress.step("checking configuration, port, memory and models"):
        config = load_config(options.config)
        listener = stack.enter_context(_listen(config, options))
        admin = _listen_for_admins(config, listener, stack)
        _check_memory(config)
        _check_models(config)
    os.environ[CONFIG_ENV] = str(options.config.absolute())
    os.environ[TOKEN_ENV] = (
        config.gateway.resolve_host_token(os.environ)
        or os.environ.get(TOKEN_ENV)
        or secrets.token_urlsafe(32)
    )
    _announce_tracing(config)
    with progress.step("state store"):
        store = _start_store(config, stack)
    hosts = bool(config.hosts)
    with progress.step("Ray cluster" if hosts else "Ray cluster (not needed: no hosts)"):
        if hosts:
            _start_ray(stack, stop)
    with progress.step("expert hosts: engine and weight pool") as note:
        if hosts:
            _start_hosts(options.config, config, stack, note)
    with progress.step("gateway"):
        workers = Workers(
            listener,
            options.workers or config.gateway.workers,
            admin=admin,
            metrics_folder=stack.enter_context(_metrics_folder()),
        )
        stack.callback(workers.stop)
        workers.start()
        state = _wait_ready(listener.getsockname(), workers)
    _print_ready(config, listener.getsockname(), admin, state)
    own = child_pids()
    while not stop.wait(1.0):
        workers.keep_alive()
        bury_orphans(own | workers.pids)
        if store is not None:
            store.keep_alive()


# --- look before starting -------------------------------------------------------------------------


@contextlib.contextmanager
def _listen(config: Config, options: ServeOptions) -> Iterator[socket.socket]:
    """Take the port first: finding it in use after a minute of loading would be unkind."""
    host = options.host or config.gateway.host
    port = config.gateway.port if options.port is None else options.port
    with _listening(
        host, port, "coe serve --port 8080, with make: make serve SERVE_FLAGS='--port 8080'"
    ) as listener:
        yield listener


def _listen_for_admins(
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


def _check_memory(config: Config) -> None:
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


def _check_models(config: Config) -> None:
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


# --- state store ----------------------------------------------------------------------------------


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


def _start_store(config: Config, stack: contextlib.ExitStack) -> EmbeddedStore | None:
    url = config.state.resolve_redis_url(os.environ)
    if url is not None:
        os.environ[REDIS_ENV] = url
        return None
    store = EmbeddedStore(_data_folder(config, stack))
    stack.callback(store.stop)
    os.environ[REDIS_ENV] = store.url
    _forget_progress(config, store.url)
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


def _forget_progress(config: Config, url: str) -> None:
    """News of the last run's hosts is not news of this one's."""
    import redis

    from deployments.registry import progress_key

    with redis.Redis.from_url(url, socket_timeout=5, socket_connect_timeout=5) as client:
        for host in config.hosts:
            client.delete(progress_key(host.name))


# --- Ray and the expert hosts ---------------------------------------------------------------------


def _start_ray(stack: contextlib.ExitStack, stop: threading.Event) -> None:
    """A local cluster of our own on the loopback, or the one that RAY_ADDRESS names."""
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
        _on_signals(stop)  # Ray's core puts a handler of its own in place, which aborts
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


def _start_hosts(
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


# --- gateway workers ------------------------------------------------------------------------------


@contextlib.contextmanager
def _metrics_folder() -> Iterator[Path]:
    """Where workers share their numbers; in memory where the system has such a place."""
    shared = Path("/dev/shm")
    base = shared if os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="coe-metrics-", dir=base) as folder:
        yield Path(folder)


def _announce_tracing(config: Config) -> None:
    """To workers and hosts, by the variables that OpenTelemetry's own libraries read."""
    telemetry = config.telemetry
    if telemetry.otlp_endpoint is None or tracing_wanted(os.environ):
        return
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = telemetry.otlp_endpoint
    os.environ.setdefault("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    os.environ.setdefault("OTEL_TRACES_SAMPLER_ARG", str(telemetry.sample_ratio))


def _wait_ready(
    address: tuple[Any, ...], workers: Workers, timeout_s: float = 60.0
) -> dict[str, Any]:
    """The readiness report of the first worker that can serve."""
    import urllib.error
    import urllib.request

    url = f"http://{dialable(address[0])}:{address[1]}/health/ready"
    # Whatever proxy the environment names, it is not in front of ourselves.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + timeout_s
    last = "no answer"
    while time.monotonic() < deadline:
        status = workers.first_failure()
        if status is not None:
            raise StartFailed(f"the gateway ended with status {status}; see its message above")
        try:
            with opener.open(url, timeout=2) as reply:
                report: dict[str, Any] = json.load(reply)
                return report
        except urllib.error.HTTPError as error:
            last = error.read().decode(errors="replace")
        except OSError as error:
            last = str(error)
        time.sleep(0.2)
    raise StartFailed(f"the gateway is not ready after {timeout_s:.0f} s: {last}")


def _url(address: tuple[Any, ...]) -> str:
    return f"http://{dialable(address[0])}:{address[1]}"


def dialable(host: str) -> str:
    """A host to listen on, as the host part of a URL that reaches it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _print_ready(
    config: Config, address: tuple[Any, ...], admin: socket.socket | None, state: dict[str, Any]
) -> None:
    base = _url(address)
    worse = "".join(f"\n       {name}: {why}" for name, why in state.get("degraded", {}).items())
    keyed = config.gateway.require_keys
    console = "" if admin is None else f"\nConsole and admin API:  {_url(admin.getsockname())}"
    key = ' \\\n    -H "authorization: Bearer $COE_API_KEY"' if keyed else ""
    print(
        f"""
READY  {base}/v1   experts: {", ".join(config.catalogue.ids)}{worse}

  curl {base}/v1/chat/completions -H 'content-type: application/json'{key} -d '{{
    "model": "auto",
    "messages": [{{"role": "user", "content": "What is the capital of France?"}}]
  }}'

{"Make a key:  coe keys create --name me" + chr(10) if keyed else ""}\
Which expert would answer, and why:  coe route "How many apples are 3 boxes of 12?"{console}
Stop with Ctrl-C.
""",
        flush=True,
    )


__all__ = ["ConfigError", "ServeOptions", "StartFailed", "serve"]
