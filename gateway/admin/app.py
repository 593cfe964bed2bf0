"""The admin port's application: API below ``/admin``, console at ``/``, metrics beside them."""

from __future__ import annotations

import uuid

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response

from gateway.admin.guard import AdminGuard
from gateway.admin.keys_api import keys_router
from gateway.admin.parts import AdminParts
from gateway.admin.policies_api import policies_router
from gateway.admin.state_api import state_router
from gateway.admission import BodyLimit, ConcurrencyLimit
from gateway.app import add_error_handlers
from gateway.console.page import console_page
from gateway.headers import RequestIds

__all__ = ["create_admin_app"]

BODY_BYTES_MAX = 128 * 1024
CONCURRENT_MAX = 64


def create_admin_app(parts: AdminParts, *, key: str | None) -> FastAPI:
    """Build it. ``key`` None: whoever reaches the port may use it; it must be on the loopback."""
    app = FastAPI(title="CoE Gateway admin", openapi_url=None)
    app.include_router(keys_router(parts), prefix="/admin")
    app.include_router(policies_router(parts), prefix="/admin")
    app.include_router(state_router(parts), prefix="/admin")
    _add_pages(app, parts)
    add_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(BodyLimit, body_bytes_max=BODY_BYTES_MAX)
    app.add_middleware(ConcurrencyLimit, requests_max=CONCURRENT_MAX)
    app.add_middleware(AdminGuard, key=key)
    app.add_middleware(RequestIds, new_id=lambda: uuid.uuid4().hex)
    return app


def _add_pages(app: FastAPI, parts: AdminParts) -> None:
    page = console_page()

    @app.get("/")
    async def console() -> Response:
        return Response(page.html, media_type="text/html", headers=page.headers)

    @app.get("/health/live")
    async def live() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/admin/metrics")
    async def metrics() -> Response:
        return Response(parts.metrics.render(), media_type=parts.metrics.content_type)
