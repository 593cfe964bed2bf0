"""``coe serve``: bring everything up in order, watch it, take everything down.

Order: look before starting (config, ports, memory, models), then state store, Ray, expert hosts,
gateway workers. Whatever fails says what to do, and what was started before it is stopped again.
The supervisor itself serves nothing: workers and hosts are processes of their own, so that no slow
start and no crash of one touches another.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deployments.environment import CONFIG_ENV, TOKEN_ENV
from experts.errors import CoeError
from experts.tracing import tracing_wanted
from gateway.config import Config, load_config
from gateway.process_tree import (
    adopt_orphans,
    bury_orphans,
    child_pids,
    end_descendants,
)
from gateway.progress import Progress
from gateway.reload import reloaded
from gateway.start_checks import check_memory, check_models, listen, listen_for_admins
from gateway.start_failed import StartFailed
from gateway.start_hosts import forget_progress, start_hosts, start_ray
from gateway.start_report import print_ready, wait_ready
from gateway.start_store import start_store
from gateway.worker_processes import Workers

__all__ = ["ServeOptions", "StartFailed", "serve"]

STEPS = 5


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """The command line of ``coe serve``; None means "as the configuration says"."""

    config: Path
    host: str | None = None
    port: int | None = None
    workers: int | None = None


def serve(options: ServeOptions) -> int:
    """Run until SIGINT or SIGTERM; SIGUSR1 takes a changed configuration over (``reload``).

    Returns the process's exit status.
    """
    stop, reload = threading.Event(), threading.Event()
    _on_signals(stop)
    signal.signal(signal.SIGUSR1, lambda _number, _frame: reload.set())
    adopt_orphans()
    progress = Progress(STEPS)
    status = 0
    left: list[int] = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: left.append(_end_leftovers()))
        try:
            _start_and_watch(options, progress, stack, stop, reload)
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
    reload: threading.Event,
) -> None:
    with progress.step("checking configuration, port, memory and models"):
        config = load_config(options.config)
        listener = stack.enter_context(listen(config, options.host, options.port))
        admin = listen_for_admins(config, listener, stack)
        check_memory(config)
        check_models(config)
    os.environ[CONFIG_ENV] = str(options.config.absolute())
    os.environ[TOKEN_ENV] = (
        config.gateway.resolve_host_token(os.environ)
        or os.environ.get(TOKEN_ENV)
        or secrets.token_urlsafe(32)
    )
    _announce_tracing(config)
    with progress.step("state store"):
        store = start_store(config, stack)
    hosts = bool(config.hosts)
    with progress.step("Ray cluster" if hosts else "Ray cluster (not needed: no hosts)"):
        if hosts:
            start_ray(stack, lambda: _on_signals(stop))
    with progress.step("expert hosts: engine and weight pool") as note:
        if hosts:
            if store is not None:
                forget_progress(config, store.url)
            start_hosts(options.config, config, stack, note)
    with progress.step("gateway"):
        workers = Workers(
            listener,
            options.workers or config.gateway.workers,
            admin=admin,
            metrics_folder=stack.enter_context(_metrics_folder()),
        )
        stack.callback(workers.stop)
        workers.start()
        state = wait_ready(listener.getsockname(), workers)
    print_ready(config, listener.getsockname(), admin, state)
    own = child_pids()
    while not stop.wait(1.0):
        if reload.is_set():
            reload.clear()
            config = reloaded(config, options.config, workers)
        workers.keep_alive()
        bury_orphans(own | workers.pids)
        if store is not None:
            store.keep_alive()


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
