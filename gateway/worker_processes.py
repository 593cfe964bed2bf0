"""The gateway's worker processes: started together, restarted alone, relieved, stopped in order."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from gateway.metric_registry import FOLDER_ENV, forget_worker
from gateway.process_tree import dies_with_us
from gateway.start_failed import StartFailed

__all__ = ["READY_FD_ENV", "Workers"]

READY_FD_ENV = "COE_READY_FD"  # a worker writes a byte there once it can serve
_WORKER_READY_S = 60.0
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
        self._leaving: list[subprocess.Popen[bytes]] = []
        self._restarts = 0

    @property
    def pids(self) -> frozenset[int]:
        """Of those that serve and of those that finish what they have."""
        serving = [p for p in self._processes if p is not None]
        return frozenset(p.pid for p in (*serving, *self._leaving))

    def start(self) -> None:
        for at, process in enumerate(self._processes):
            if process is None:
                self._processes[at] = self._spawn(at)

    def relieve(self) -> None:
        """Put new workers, which read the configuration anew, in the place of those that serve.

        Both accept for a moment; then the old ones finish what they have begun, however long a
        request may last. Raises StartFailed when a new one cannot serve; the old ones still do.
        """
        fresh: list[subprocess.Popen[bytes]] = []
        try:
            for at in range(len(self._processes)):
                fresh.append(self._spawn_ready(at))
        except BaseException:  # also a signal to stop
            for process in fresh:
                process.terminate()
            self._leaving += fresh
            raise
        old, self._processes = self._processes, list(fresh)
        self._restarts = 0
        for leaving in filter(None, old):
            leaving.send_signal(signal.SIGUSR2)
            self._leaving.append(leaving)

    def _spawn_ready(self, at: int) -> subprocess.Popen[bytes]:
        """A worker that says it can serve. Raises StartFailed, with none left behind."""
        reader, writer = os.pipe()
        try:
            try:
                process = self._spawn(at, ready_fd=writer)
            finally:
                os.close(writer)  # the worker's end is the only one left, so its death is seen
            try:
                ready, _, _ = select.select([reader], [], [], _WORKER_READY_S)
                if ready and os.read(reader, 1):
                    return process
            except BaseException:
                process.kill()
                raise
            process.kill()
            status = process.wait()
            why = f"ended with status {status}" if ready else f"said nothing in {_WORKER_READY_S} s"
            raise StartFailed(f"the new gateway worker {why}; see its message above")
        finally:
            os.close(reader)

    def _spawn(self, at: int, ready_fd: int | None = None) -> subprocess.Popen[bytes]:
        descriptors = [self._listener.fileno()]
        if at == 0 and self._admin is not None:
            descriptors.append(self._admin.fileno())
        environment = dict(os.environ)
        passed = list(descriptors)
        if ready_fd is not None:
            environment[READY_FD_ENV] = str(ready_fd)
            passed.append(ready_fd)
        if self._metrics_folder is not None:
            environment[FOLDER_ENV] = str(self._metrics_folder)
        # A session of its own: Ctrl-C reaches the supervisor, which stops workers in order.
        return subprocess.Popen(
            [sys.executable, "-m", "gateway.worker", *map(str, descriptors)],
            pass_fds=passed,
            env=environment,
            start_new_session=True,
            preexec_fn=dies_with_us(),
        )

    def keep_alive(self) -> None:
        """Start workers again that died; give up when they keep dying."""
        for gone in [process for process in self._leaving if process.poll() is not None]:
            self._leaving.remove(gone)
            self._forget(gone)
        for at, process in enumerate(self._processes):
            if process is not None and process.poll() is not None:
                self._restarts += 1
                if self._restarts > _WORKER_RESTARTS_MAX:
                    raise StartFailed("gateway workers keep ending; see the log above")
                print(
                    f"gateway worker ended with status {process.returncode}; starting another",
                    file=sys.stderr,
                )
                self._forget(process)
                self._processes[at] = self._spawn(at)

    def _forget(self, process: subprocess.Popen[bytes]) -> None:
        if self._metrics_folder is not None:
            forget_worker(process.pid, self._metrics_folder)

    def first_failure(self) -> int | None:
        """Exit status of a worker that has ended, if one has."""
        for process in self._processes:
            if process is not None and process.poll() is not None:
                return process.returncode
        return None

    def stop(self) -> None:
        serving = [p for p in self._processes if p is not None]
        running = [p for p in (*serving, *self._leaving) if p.poll() is None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + _WORKER_STOP_S
        for process in running:
            try:
                process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
