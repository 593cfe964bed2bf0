"""``coe serve`` in a process of its own, for the time of a run."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = ROOT / "examples" / "quickstart" / "coe.yaml"
READY_S = 300.0
STOP_S = 60.0


class NotServed(RuntimeError):
    """The gateway did not come up; the message holds what it said."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(config: Path = QUICKSTART) -> Iterator[str]:
    """The base URL (ending in ``/v1``) of a gateway that serves ``config`` until the block ends."""
    with tempfile.TemporaryDirectory(prefix="coe-composition-") as folder:
        log = Path(folder) / "serve.log"
        environment = {**os.environ, "XDG_STATE_HOME": str(Path(folder) / "state")}
        command = [sys.executable, "-m", "gateway.cli", "serve", "--config", str(config)]
        with log.open("w") as out:
            process = subprocess.Popen(
                [*command, "--port", str(_free_port())],
                cwd=ROOT,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            yield _ready_url(process, log)
        finally:
            _stop(process)


def _ready_url(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        found = re.search(r"^READY\s+(\S+)", log.read_text(), re.MULTILINE)
        if found:
            return found.group(1)
        if process.poll() is not None:
            raise NotServed(f"coe serve ended:\n{log.read_text()}")
        time.sleep(0.25)
    raise NotServed(f"not ready after {READY_S:.0f} s:\n{log.read_text()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
