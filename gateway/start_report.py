"""The end of a start: wait until a worker can serve, and tell the user what to try first."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from gateway.config import Config
from gateway.start_failed import StartFailed
from gateway.worker_processes import Workers

__all__ = ["dialable", "print_ready", "wait_ready"]


def wait_ready(
    address: tuple[Any, ...], workers: Workers, timeout_s: float = 60.0
) -> dict[str, Any]:
    """The readiness report of the first worker that can serve."""
    import urllib.error
    import urllib.request

    url = f"http://{dialable(address[0])}:{address[1]}/health/ready"
    # Whatever proxy the environment names, it is not in front of ourselves.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + timeout_s
    last = "no answer"
    while time.monotonic() < deadline:
        status = workers.first_failure()
        if status is not None:
            raise StartFailed(f"the gateway ended with status {status}; see its message above")
        try:
            with opener.open(url, timeout=2) as reply:
                report: dict[str, Any] = json.load(reply)
                return report
        except urllib.error.HTTPError as error:
            last = error.read().decode(errors="replace")
        except OSError as error:
            last = str(error)
        time.sleep(0.2)
    raise StartFailed(f"the gateway is not ready after {timeout_s:.0f} s: {last}")


def _url(address: tuple[Any, ...]) -> str:
    return f"http://{dialable(address[0])}:{address[1]}"


def dialable(host: str) -> str:
    """A host to listen on, as the host part of a URL that reaches it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def print_ready(
    config: Config, address: tuple[Any, ...], admin: socket.socket | None, state: dict[str, Any]
) -> None:
    base = _url(address)
    worse = "".join(f"\n       {name}: {why}" for name, why in state.get("degraded", {}).items())
    keyed = config.gateway.require_keys
    console = "" if admin is None else f"\nConsole and admin API:  {_url(admin.getsockname())}"
    key = ' \\\n    -H "authorization: Bearer $COE_API_KEY"' if keyed else ""
    print(
        f"""
READY  {base}/v1   experts: {", ".join(config.catalogue.ids)}{worse}

  curl {base}/v1/chat/completions -H 'content-type: application/json'{key} -d '{{
    "model": "auto",
    "messages": [{{"role": "user", "content": "What is the capital of France?"}}]
  }}'

{"Make a key:  coe keys create --name me" + chr(10) if keyed else ""}\
Which expert would answer, and why:  coe route "How many apples are 3 boxes of 12?"{console}
Stop with Ctrl-C.
""",
        flush=True,
    )
