"""The embedded server: starts, keeps its secret, survives a restart, never outlives its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from deployments import embedded_valkey
from deployments.embedded_valkey import EmbeddedValkey
from experts.errors import ConfigError

pytestmark = pytest.mark.valkey

ROOT = Path(__file__).parents[2]
PARENT = """
import sys, time
from deployments.embedded_valkey import EmbeddedValkey
server = EmbeddedValkey()
server.wait_ready()
print(server.pid, flush=True)
time.sleep(600)
"""


def gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


def test_server_dies_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
    assert psutil.Process(pid).name().startswith("valkey")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone_within(pid, 30)


def test_server_outlives_the_thread_that_started_it() -> None:
    server = EmbeddedValkey()
    thread = threading.Thread(target=server.wait_ready)
    thread.start()
    thread.join()
    assert not gone_within(server.pid or 0, 0.5)
    server.wait_ready()
    server.stop()


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(embedded_server: EmbeddedValkey) -> None:
    assert embedded_server.pid is not None
    assert os.getpgid(embedded_server.pid) != os.getpgrp()


def test_password_is_needed_and_shows_nowhere(embedded_server: EmbeddedValkey) -> None:
    password = embedded_server.url.split(":")[2].split("@")[0]
    port = int(embedded_server.url.rsplit(":", 1)[1].split("/")[0])
    with (
        redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()
    assert embedded_server.pid is not None
    command_line = psutil.Process(embedded_server.pid).cmdline()
    assert password not in " ".join(command_line) + repr(embedded_server)


def test_killed_server_starts_again_at_the_same_address() -> None:
    server = EmbeddedValkey()
    server.wait_ready()
    url, pid = server.url, server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert gone_within(pid, 30)
    while server.alive:
        time.sleep(0.01)
    server.start()
    server.wait_ready()
    assert (server.url, server.pid != pid) == (url, True)
    server.stop()
    assert not server.alive


def test_data_folder_keeps_data_over_a_kill(tmp_path: Path) -> None:
    server = EmbeddedValkey(data_dir=tmp_path / "state")
    server.wait_ready()
    with redis.Redis.from_url(server.url) as client:
        client.set("x", "kept")
    server.stop()
    with server, redis.Redis.from_url(server.url) as client:
        assert client.get("x") == b"kept"


def test_nothing_is_kept_by_default() -> None:
    server = EmbeddedValkey()
    with server, redis.Redis.from_url(server.url) as client:
        client.set("x", "lost")
    with server, redis.Redis.from_url(server.url) as client:
        assert client.get("x") is None


def test_port_in_use_is_named_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError) as refusal:
            EmbeddedValkey(port=port).wait_ready()
    assert f"127.0.0.1:{port}" in refusal.value.message
    assert "state.redis_url" in refusal.value.message


def test_free_port_lost_to_another_process_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        taken, free_port = holder.getsockname()[1], embedded_valkey._free_port
        offered: list[int] = []

        def offer() -> int:
            offered.append(free_port() if offered else taken)
            return offered[-1]

        monkeypatch.setattr(embedded_valkey, "_free_port", offer)
        with EmbeddedValkey() as server:
            assert len(offered) > 1
            assert f":{offered[-1]}/" in server.url
