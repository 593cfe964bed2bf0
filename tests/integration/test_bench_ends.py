"""A bench that is ended in the middle, or killed, leaves no process behind."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.integration.stack import ROOT

pytestmark = pytest.mark.valkey

BELOW = ("gateway.worker", "gateway.worker", "--serve", "valkey-server")


def processes_below(bench: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """All that it starts, once all of them are there."""
    deadline = time.monotonic() + 120
    while True:
        below = psutil.Process(bench.pid).children(recursive=True)
        said = [command_of(process) for process in below]
        if all(sum(name in line for line in said) >= BELOW.count(name) for name in BELOW):
            return below
        assert bench.poll() is None
        assert time.monotonic() < deadline, said
        time.sleep(0.1)


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_the_soak(number: signal.Signals) -> None:
    bench = subprocess.Popen([sys.executable, "bench/soak.py", "--minutes", "10"], cwd=ROOT)
    below: list[psutil.Process] = []
    try:
        below = processes_below(bench)
        bench.send_signal(number)
        status = bench.wait(timeout=60)
        _, alive = psutil.wait_procs(below, timeout=60)
        assert [process.cmdline() for process in alive] == []
        assert status == (-number if number is signal.SIGKILL else 128 + number)
    finally:
        bench.kill()
        bench.wait()
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
