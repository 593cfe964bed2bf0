"""How ``coe serve`` and its workers end: with real processes and real signals."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Program:
    """A Python program that says a line when it is ready to be disturbed."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def ready(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line == "ready\n", (line, self._process.communicate())

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def go_on(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def ended(self) -> tuple[int, str, str]:
        out, err = self._process.communicate(timeout=60)
        return self._process.returncode, out, err


@contextmanager
def program(code: str, *arguments: str, pass_fds: tuple[int, ...] = ()) -> Iterator[Program]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
    )
    try:
        with process:
            yield Program(process)
    finally:
        process.kill()


STUBBORN = '''
import signal, subprocess, sys, time
from gateway.process_tree import adopt_orphans, end_descendants
adopt_orphans()
deaf = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(flush=True)
time.sleep(60)
"""
heir = """
import subprocess, sys
print(flush=True)
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""
for code in (deaf, heir):
    child = subprocess.Popen([sys.executable, "-c", code, deaf], stdout=subprocess.PIPE)
    child.stdout.readline()
print("left", end_descendants(grace_s=0.3, report=lambda text: None))
'''

SERVE = """
import sys, time
from pathlib import Path
from gateway import supervisor

def start(options, progress, stack, stop, reload):
    stack.callback(print, "cleaned", flush=True)
    if sys.argv[1] == "failing":
        stack.callback(sys.stdin.readline)  # until it has been disturbed
        stack.callback(print, "ready", flush=True)
        raise supervisor.StartFailed("the reason")
    print("ready", flush=True)
    for _ in range(500):
        try:
            time.sleep(0.1)
        except Exception:
            pass  # as a library may do
    print("never interrupted", flush=True)

supervisor._start_and_watch = start
sys.exit(supervisor.serve(supervisor.ServeOptions(Path("coe.yaml"))))
"""

WORKER = """
import asyncio, sys
from contextlib import asynccontextmanager
from types import SimpleNamespace
from gateway import worker
from gateway.config import GatewaySection

@asynccontextmanager
async def parts(config, url):
    if sys.argv[2] == "starting":
        print("ready", flush=True)
        await asyncio.sleep(60)
    try:
        yield None
    finally:
        await asyncio.sleep(0.05)
        print("closed", flush=True)

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})
    print("ready", flush=True)

worker.open_parts, worker.application = parts, lambda _: app
worker.load_config = lambda _: SimpleNamespace(gateway=GatewaySection())
sys.exit(worker.main(sys.argv[1:2]))
"""


def test_no_descendant_is_left_however_deaf_or_fertile() -> None:
    with program(STUBBORN) as running:
        status, out, err = running.ended()
    assert (status, out) == (0, "left 0\n"), err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_the_start_gets_through_libraries_that_catch_everything(
    number: signal.Signals,
) -> None:
    with program(SERVE, "starting") as running:
        running.ready()
        running.send(number)
        status, out, err = running.ended()
    assert (status, out) == (0, "cleaned\n"), err
    assert err.endswith("stopped; no process is left behind\n")


def test_a_signal_during_the_clean_up_does_not_cut_it_short() -> None:
    with program(SERVE, "failing") as running:
        running.ready()
        running.send(signal.SIGTERM)
        running.send(signal.SIGINT)
        running.go_on()
        status, out, err = running.ended()
    assert (status, out) == (1, "cleaned\n")
    assert "Traceback" not in err
    assert err.startswith("coe serve: the reason\n")


@pytest.mark.parametrize("moment", ["starting", "serving"])
def test_a_worker_that_is_terminated_closes_what_it_has_open(moment: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        arguments = (str(listener.fileno()), moment)
        with (
            _environment(COE_REDIS_URL="redis://unused"),
            program(WORKER, *arguments, pass_fds=(listener.fileno(),)) as running,
        ):
            if moment == "serving":
                with socket.create_connection(listener.getsockname()) as client:
                    client.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                    running.ready()
            else:
                running.ready()
            running.send(signal.SIGTERM)
            status, out, err = running.ended()
    assert (status, out) == (0, "closed\n" if moment == "serving" else ""), err
    assert "Traceback" not in err


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield
