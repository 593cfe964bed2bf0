"""Who may use the admin port: whoever has its key, and no web page that happens to reach it.

With a key, every path below ``/admin`` needs it. Without one the port listens on the loopback only,
where the danger is a browser: pages from elsewhere can make it send requests here (cross-site
request forgery), or rebind a name of theirs to this address. So requests of other origins are
refused, and without a key so is every ``Host`` that is not this machine.
"""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from experts.errors import AuthenticationFailed, CoeError
from gateway.config import is_loopback
from gateway.http_errors import answer_for
from gateway.keys import sent_secret

__all__ = ["AdminGuard"]

_OWN_FETCHES = (b"same-origin", b"none")


class AdminGuard:
    """Pure ASGI middleware. ``key`` None: the loopback is trusted, other origins are not."""

    def __init__(self, app: ASGIApp, *, key: str | None, prefix: str = "/admin") -> None:
        self._app = app
        self._key = None if key is None else key.encode()
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(self._prefix):
            refusal = self._refusal(scope)
            if refusal is not None:
                await _refuse(send, refusal)
                return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> CoeError | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if not _own_origin(headers, host):
            return AuthenticationFailed("Requests from other sites are refused.")
        if self._key is None:
            if is_loopback(_name_of(host)):
                return None
            return AuthenticationFailed(
                "Without an admin key only loopback addresses are answered."
            )
        secret = sent_secret(scope["headers"])
        if secret is None or not hmac.compare_digest(secret.encode("latin-1"), self._key):
            return AuthenticationFailed("The admin key is missing or wrong.")
        return None


def _own_origin(headers: dict[bytes, bytes], host: str) -> bool:
    """Whether the request comes from our own page, or from no page at all."""
    if headers.get(b"sec-fetch-site", b"none") not in _OWN_FETCHES:
        return False
    origin = headers.get(b"origin")
    return origin is None or urlsplit(origin.decode("latin-1")).netloc == host


def _name_of(host: str) -> str:
    """A ``Host`` without port and brackets; empty for what cannot be read."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


async def _refuse(send: Send, error: CoeError) -> None:
    answer = answer_for(error)
    headers = [*answer.headers, (b"www-authenticate", b"Bearer")]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})
