"""The gateway's worker processes: started together, restarted alone, stopped in order."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from gateway.metric_registry import FOLDER_ENV, forget_worker
from gateway.process_tree import dies_with_us
from gateway.start_failed import StartFailed

__all__ = ["Workers"]

_WORKER_STOP_S = 10.0
_WORKER_RESTARTS_MAX = 20


class Workers:
    """The gateway's processes, all accepting from one listening socket.

    The first of them has the admin socket as well; whoever replaces it inherits that. Several share
    their metrics in ``metrics_folder``, so that a scrape of any of them tells of all.
    """

    def __init__(
        self,
        listener: socket.socket,
        count: int,
        *,
        metrics_folder: Path,
        admin: socket.socket | None = None,
    ) -> None:
        self._listener = listener
        self._admin = admin
        self._metrics_folder = metrics_folder if count > 1 else None
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * count
        self._restarts = 0

    @property
    def pids(self) -> frozenset[int]:
        return frozenset(p.pid for p in self._processes if p is not None)

    def start(self) -> None:
        for at, process in enumerate(self._processes):
            if process is None:
                self._processes[at] = self._spawn(at)

    def _spawn(self, at: int) -> subprocess.Popen[bytes]:
        descriptors = [self._listener.fileno()]
        if at == 0 and self._admin is not None:
            descriptors.append(self._admin.fileno())
        environment = dict(os.environ)
        if self._metrics_folder is not None:
            environment[FOLDER_ENV] = str(self._metrics_folder)
        # A session of its own: Ctrl-C reaches the supervisor, which stops workers in order.
        return subprocess.Popen(
            [sys.executable, "-m", "gateway.worker", *map(str, descriptors)],
            pass_fds=descriptors,
            env=environment,
            start_new_session=True,
            preexec_fn=dies_with_us(),
        )

    def keep_alive(self) -> None:
        """Start workers again that died; give up when they keep dying."""
        for at, process in enumerate(self._processes):
            if process is not None and process.poll() is not None:
                self._restarts += 1
                if self._restarts > _WORKER_RESTARTS_MAX:
                    raise StartFailed("gateway workers keep ending; see the log above")
                print(
                    f"gateway worker ended with status {process.returncode}; starting another",
                    file=sys.stderr,
                )
                if self._metrics_folder is not None:
                    forget_worker(process.pid, self._metrics_folder)
                self._processes[at] = self._spawn(at)

    def first_failure(self) -> int | None:
        """Exit status of a worker that has ended, if one has."""
        for process in self._processes:
            if process is not None and process.poll() is not None:
                return process.returncode
        return None

    def stop(self) -> None:
        running = [p for p in self._processes if p is not None and p.poll() is None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + _WORKER_STOP_S
        for process in running:
            try:
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
