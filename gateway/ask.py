"""Asking a gateway that runs somewhere, for the command line: a JSON object, or a sentence."""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

__all__ = ["CommandFailed", "ask", "base_url"]

_TIMEOUT_S = 10.0
_KEY_ENV = "COE_API_KEY"


class CommandFailed(Exception):
    """A command cannot do what it was asked; the text says why and what helps."""


def base_url(url: str) -> str:
    """The gateway's address as a person may give it: with or without a slash or ``/v1`` at the end.

    Raises CommandFailed when it is not an HTTP address.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise CommandFailed(f"{url!r} is not an address such as http://127.0.0.1:8000.")
    return url.rstrip("/").removesuffix("/v1")


def ask(url: str, expected: str, body: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """GET, or POST of ``body``. None when nobody answers at all.

    Sends the key in COE_API_KEY if there is one. The status does not matter: a readiness report may
    come with 503. Raises CommandFailed when the answer is an error, or has no field ``expected``
    and so is not a gateway's.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    if key := os.environ.get(_KEY_ENV):
        headers["authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data, headers)
    try:
        with _opener(url).open(request, timeout=_TIMEOUT_S) as reply:
            raw = reply.read()
    except urllib.error.HTTPError as error:
        with error:
            raw = error.read()
    except OSError:
        return None
    except http.client.HTTPException as error:
        raise _stranger(url) from error
    return _checked(url, raw, expected)


def _checked(url: str, raw: bytes, expected: str) -> dict[str, Any]:
    try:
        payload = json.loads(raw)
    except ValueError as error:
        raise _stranger(url) from error
    if not isinstance(payload, dict):
        raise _stranger(url)
    refusal = payload.get("error")
    if isinstance(refusal, dict):
        raise CommandFailed(str(refusal.get("message")))
    if expected not in payload:
        raise _stranger(url)
    return payload


def _stranger(url: str) -> CommandFailed:
    return CommandFailed(f"what answers at {url} is not a gateway. Name yours with --url.")


def _opener(url: str) -> urllib.request.OpenerDirector:
    """Proxies of the environment are for others: none of them stands before this machine."""
    if _is_loopback(urllib.parse.urlsplit(url).hostname or ""):
        return urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
