"""The optional peer of ``overhead.py``: vLLM's Rust router in front of the same upstream.

``pip install vllm-router==0.1.17`` puts the command beside this interpreter or on the path; without
it the comparison is left out and says so. It runs as its documentation starts it, one worker and no
retries wanted, with logging at its quietest, as the gateway's own access log is off.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gateway.process_tree import dies_with_us


class Peer(NamedTuple):
    url: str
    pid: int


def command(given: str | None) -> str | None:
    """The executable to run: ``given``, or the one beside the interpreter, or on the path."""
    if given is not None:
        return given
    beside = Path(sys.executable).with_name("vllm-router")
    return str(beside) if beside.exists() else shutil.which("vllm-router")


@contextlib.contextmanager
def running(executable: str, upstream: str) -> Iterator[Peer]:
    """The peer on a free port, ended with the block."""
    port, metrics_port = _free_port(), _free_port()
    with tempfile.TemporaryDirectory() as logs:
        process = subprocess.Popen(
            [
                executable,
                *("--worker-urls", upstream),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--prometheus-port", str(metrics_port)),
                *("--policy", "round_robin", "--log-level", "error", "--log-dir", logs),
            ],
            stdout=subprocess.DEVNULL,
            preexec_fn=dies_with_us(),
            stderr=subprocess.DEVNULL,
        )
        try:
            yield Peer(f"http://127.0.0.1:{port}", process.pid)
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    """A port that was free a moment ago: the peer takes numbers only, not an open socket."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
