"""The client of the state store (Valkey or Redis): bounded in time, honest about outages.

Every call ends within ``timeout_ms``, connecting included, or raises ``StateUnavailable``. After a
failure the store counts as away for a back-off during which calls are refused at once
(``store_health``). State changes are logged once, never per call. All writes that depend on what
they read are Lua scripts, so nothing here checks and then acts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, cast
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from deployments.store_errors import Trouble, classify
from deployments.store_health import Admission, StoreHealth
from experts.errors import ConfigError, StateUnavailable

log = logging.getLogger(__name__)

Argument = str | bytes | int | float

_LATE = 1.5  # a timeout that fires this many times too late says more about us than about the store
_COMPLAINT_EVERY_MS = 60_000.0


@dataclass(frozen=True, slots=True)
class _Script:
    source: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1(self.source.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest)


class StateStore:
    """One event loop's connections to one store.

    ``url``: ``redis://``, ``rediss://`` or ``unix://``; its password is never logged.
    ``timeout_ms`` bounds each call as a whole. ``namespace`` is the first part of every key, so
    that installations can share a server. ``max_connections`` bounds the sockets; further calls
    wait, within their time. ``clock_ms`` is monotonic. Raises ConfigError for a URL that cannot be
    read.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_ms: float = 250,
        namespace: str = "coe",
        max_connections: int = 64,
        clock_ms: Callable[[], float] = lambda: time.monotonic() * 1000,
    ) -> None:
        self.timeout_ms = timeout_ms
        self._namespace = namespace
        self._clock_ms = clock_ms
        self._address = _address(url)
        self._client = _client(url, timeout_ms / 1000, max_connections)
        self._scripts: dict[str, _Script] = {}
        self._health = StoreHealth()
        self._complained_ms: dict[str, float] = {}
        self._dropping: asyncio.Task[None] | None = None

    @property
    def available(self) -> bool:
        """False from the first failure until a call succeeds again."""
        return self._health.up

    def key(self, *parts: str) -> str:
        """A key of this installation: ``key("hosts", "x")`` is ``coe:hosts:x``."""
        return ":".join((self._namespace, *parts))

    def add_script(self, name: str, source: str) -> None:
        """Make a Lua script known to ``eval_script``. Adding the same one again is harmless."""
        script = _Script(source)
        if self._scripts.setdefault(name, script) != script:
            raise ValueError(f"another script is already called {name!r}")

    async def ping(self) -> float:
        """Round trip in milliseconds. Raises StateUnavailable."""
        began_ms = self._clock_ms()
        await self.command("PING")
        return self._clock_ms() - began_ms

    async def command(self, *args: Argument) -> Any:
        """One command, its reply as redis-py decodes it, text as bytes. Raises StateUnavailable."""
        return await self._bounded(str(args[0]).lower(), lambda: self._send(*args))

    async def eval_script(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run a script added before, atomically, in one round trip (two when the server forgot it).

        Raises StateUnavailable; KeyError for a name never added; ``redis.ResponseError`` when the
        script itself is at fault, because a defect must not pass for an outage.
        """
        script = self._scripts[name]
        return await self._bounded(name, lambda: self._run_script(script, keys, args))

    async def _run_script(
        self, script: _Script, keys: Sequence[str], args: Sequence[Argument]
    ) -> Any:
        rest = (len(keys), *keys, *args)
        try:
            return await self._send("EVALSHA", script.sha, *rest)
        except NoScriptError:  # never loaded, flushed, or another server: EVAL loads it again
            return await self._send("EVAL", script.source, *rest)

    def _send(self, *args: Argument) -> Awaitable[Any]:
        reply: Awaitable[Any] = self._client.execute_command(*args)  # type: ignore[no-untyped-call]
        return reply

    async def aclose(self) -> None:
        """Close all connections."""
        if self._dropping is not None:
            await self._dropping
        await self._client.aclose(close_connection_pool=True)

    def __repr__(self) -> str:
        return f"StateStore({self._address}, available={self.available})"

    async def _bounded(self, operation: str, call: Callable[[], Awaitable[Any]]) -> Any:
        began_ms = self._clock_ms()
        admission = self._health.admit(began_ms)
        if admission is None:
            raise StateUnavailable(operation, self._retry_after_ms())
        try:
            async with asyncio.timeout(self.timeout_ms / 1000):
                reply = await call()
        except (RedisError, TimeoutError, OSError) as error:
            trouble = classify(error)
            self._note_failure(error, trouble, admission, began_ms, operation)
            if trouble in (Trouble.DEFECT, Trouble.UNSENT):
                raise
            raise StateUnavailable(operation, self._retry_after_ms()) from error
        except BaseException:  # cancelled: no evidence, but the probe's place must be given back
            self._health.abandoned(admission)
            raise
        self._note_success(admission)
        return reply

    def _note_success(self, admission: Admission) -> None:
        if self._health.succeeded(admission):
            log.warning("state store %s is back", self._address)

    def _note_failure(
        self,
        error: Exception,
        trouble: Trouble,
        admission: Admission,
        began_ms: float,
        operation: str,
    ) -> None:
        now_ms = self._clock_ms()
        late = isinstance(error, TimeoutError) and now_ms - began_ms > _LATE * self.timeout_ms
        if trouble is Trouble.UNSENT or late:
            self._health.abandoned(admission)
        elif trouble is not Trouble.AWAY:  # it answered, so it is there
            self._note_success(admission)
            if trouble is Trouble.REFUSED:
                self._complain(error, operation, now_ms)
        elif self._health.failed(admission, now_ms):
            reason = _reason(error, self.timeout_ms)
            log.error("state store %s is away (%s): %s", self._address, operation, reason)
            self._dropping = asyncio.create_task(self._drop_idle_connections())

    async def _drop_idle_connections(self) -> None:
        """Idle sockets may be as dead as the one that failed; a probe should not meet them."""
        with contextlib.suppress(RedisTimeoutError):  # an unfinished TLS goodbye
            await self._client.connection_pool.disconnect(inuse_connections=False)

    def _complain(self, error: Exception, operation: str, now_ms: float) -> None:
        """A refusal lasts until somebody acts; say so once a minute."""
        kind = type(error).__name__
        if now_ms - self._complained_ms.get(kind, float("-inf")) >= _COMPLAINT_EVERY_MS:
            self._complained_ms[kind] = now_ms
            log.error("state store %s refuses %s: %s", self._address, operation, error)

    def _retry_after_ms(self) -> float:
        return max(1.0, self._health.retry_in_ms(self._clock_ms()))


def load_script(package: str, path: str) -> str:
    """The text of a Lua file that is shipped inside ``package``."""
    return files(package).joinpath(path).read_text(encoding="utf-8")


def _reason(error: Exception, timeout_ms: float) -> str:
    return f"no answer within {timeout_ms:g} ms" if isinstance(error, TimeoutError) else str(error)


def _address(url: str) -> str:
    """The URL without user, password and query."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        # Python's message quotes the text after the last colon: that may be half a password.
        raise _bad_url("the port is not a number; percent-encode the password") from None
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    return f"{parts.scheme}://{parts.hostname or 'localhost'}:{port or 6379}{parts.path}"


def _client(url: str, timeout_s: float, max_connections: int) -> Redis:
    try:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            # Waiting for a connection, connecting, writing and reading share the one bound that
            # ``_bounded`` sets. A timeout of redis-py's own would add a task per command.
            timeout=None,
            socket_timeout=None,
            socket_connect_timeout=timeout_s,
            retry=Retry(cast(Any, NoBackoff()), 0),
            protocol=2,
            driver_info=None,
        )
    except ValueError as error:
        raise _bad_url(str(error)) from None
    return Redis.from_pool(pool)


def _bad_url(reason: str) -> ConfigError:
    return ConfigError("state store", None, "redis_url", reason)
