"""The gateway's HTTP application.

``create_app`` takes a ready ``GatewayService``; opening and closing what that uses is the
``lifespan``'s, which the caller gives.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from experts.errors import CoeError, InvalidRequest, MethodNotAllowed, UnknownRoute
from experts.types import Endpoint
from gateway.admission import BodyLimit, ConcurrencyLimit
from gateway.anthropic_errors import answer_on
from gateway.anthropic_http import CountTokensEndpoint, MessagesDialect
from gateway.dialect import OpenAiDialect
from gateway.feedback_http import FeedbackEndpoint
from gateway.headers import RequestIds, request_id_of
from gateway.metrics import Metrics
from gateway.models_http import add_models
from gateway.openai_http import AnswerEndpoint, KeepAlive, RouteEndpoint
from gateway.random_ids import RandomIds
from gateway.responses_http import ResponsesDialect
from gateway.service import GatewayService
from gateway.state.feedback import FeedbackStore

__all__ = ["HttpLimits", "Readiness", "add_error_handlers", "create_app"]

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Bounds at the door of one worker."""

    body_bytes: int = 2 * 2**20
    concurrent_requests: int = 1024
    keep_alive: KeepAlive = field(default_factory=KeepAlive)


@dataclass(frozen=True, slots=True)
class Readiness:
    """``missing``: what prevents serving, by name. ``degraded``: what works, but less well."""

    missing: Mapping[str, str] = field(default_factory=dict)
    degraded: Mapping[str, str] = field(default_factory=dict)


def create_app(
    service: GatewayService,
    *,
    metrics: Metrics,
    limits: HttpLimits | None = None,
    readiness: Callable[[], Awaitable[Readiness]],
    lifespan: Lifespan | None = None,
    new_id: Callable[[], str] | None = None,
    feedback: FeedbackStore | None = None,
) -> FastAPI:
    """Build the application. ``feedback`` None: nobody takes any. ``new_id``: of requests that
    come without one; random ones unless given.
    """
    bounds = limits or HttpLimits()
    app = FastAPI(title="CoE Gateway", lifespan=lifespan, openapi_url=None)
    hot = _hot_endpoints(service, bounds.keep_alive)
    app.router.routes[:0] = [Route(path, one, methods=["POST"]) for path, one in hot.items()]
    if feedback is not None:
        endpoint = FeedbackEndpoint(service.authenticate, feedback)
        app.router.routes.insert(0, Route("/v1/feedback", endpoint, methods=["POST"]))
    add_models(app, service)
    _add_probes(app, metrics, readiness)
    add_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(HotPaths, endpoints=hot)
    app.add_middleware(BodyLimit, body_bytes_max=bounds.body_bytes)
    app.add_middleware(
        ConcurrencyLimit,
        requests_max=bounds.concurrent_requests,
        on_change=metrics.set_in_flight,
    )
    app.add_middleware(ResponseCounter, count=metrics.count_response)
    app.add_middleware(RequestIds, new_id=new_id or RandomIds())
    return app


def _hot_endpoints(service: GatewayService, keep_alive: KeepAlive) -> dict[str, ASGIApp]:
    """Plain ASGI endpoints, by path; ``HotPaths`` hands requests to them.

    A FastAPI route would build a request object, resolve dependencies and wrap the response for
    each call, and its streaming response starts a task group per stream; measured with
    bench/overhead.py that is most of what a pass-through costs.
    """
    endpoints: dict[str, ASGIApp] = {
        f"/v1/{dialect.name}": AnswerEndpoint(service, dialect, keep_alive)
        for dialect in (
            OpenAiDialect(Endpoint.CHAT),
            OpenAiDialect(Endpoint.COMPLETIONS),
            OpenAiDialect(Endpoint.EMBEDDINGS),
            ResponsesDialect(),
            MessagesDialect(),
        )
    }
    endpoints["/v1/messages/count_tokens"] = CountTokensEndpoint(service)
    endpoints["/v1/route"] = RouteEndpoint(service)
    return endpoints


def _add_probes(
    app: FastAPI, metrics: Metrics, readiness: Callable[[], Awaitable[Readiness]]
) -> None:
    @app.get("/health/live")
    async def live() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    @app.get("/health/ready")
    async def ready() -> JSONResponse:
        state = await readiness()
        status = "unready" if state.missing else "degraded" if state.degraded else "ready"
        body = {"status": status, "missing": dict(state.missing), "degraded": dict(state.degraded)}
        return JSONResponse(body, status_code=503 if state.missing else 200)

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(metrics.render(), media_type=metrics.content_type)


# --- errors --------------------------------------------------------------------------------------


def add_error_handlers(app: FastAPI) -> None:
    """Everything that is not answered by an endpoint still goes through the one table."""
    app.add_exception_handler(CoeError, _on_coe_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(Exception, _on_unhandled)


async def _on_coe_error(request: Request, error: Exception) -> Response:
    return _response(request, error if isinstance(error, CoeError) else CoeError())


async def _on_http_exception(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == 404:
        return _response(request, UnknownRoute(request.url.path))
    if status == 405:
        allow = (getattr(error, "headers", None) or {}).get("Allow", "")
        allowed = tuple(sorted(filter(None, allow.replace(" ", "").split(","))))
        return _response(request, MethodNotAllowed(request.method, request.url.path, allowed))
    return _response(request, InvalidRequest(None, str(getattr(error, "detail", "bad request"))))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    where = ".".join(str(part) for part in first.get("loc", ()))
    return _response(request, InvalidRequest(where or None, str(first.get("msg", "invalid"))))


async def _on_unhandled(request: Request, _: Exception) -> Response:
    """The text stays generic: the cause is in the log, which the server writes on its way out."""
    response = _response(request, CoeError())
    # This handler runs outside the middleware that adds the id.
    response.headers["x-request-id"] = request_id_of(request.scope)
    return response


def _response(request: Request, error: CoeError) -> Response:
    answer = answer_on(request.scope, error)
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in answer.headers}
    return Response(answer.body, status_code=answer.status, headers=headers)


# --- dispatch ------------------------------------------------------------------------------------


class HotPaths:
    """Pure ASGI middleware, the innermost: answers POST of known paths itself.

    They turn their own errors into answers, so they need neither the framework's exception handling
    nor its matching of paths; everything else, also another method on the same path, goes on to it.
    """

    def __init__(self, app: ASGIApp, *, endpoints: Mapping[str, ASGIApp]) -> None:
        self._app = app
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hot = scope["type"] == "http" and scope["method"] == "POST"
        endpoint = self._endpoints.get(scope["path"]) if hot else None
        await (endpoint or self._app)(scope, receive, send)


# --- counting ------------------------------------------------------------------------------------

_COUNTED = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/route",
        "/v1/feedback",
        "/v1/models",
        "/health/live",
        "/health/ready",
        "/metrics",
    }
)


class ResponseCounter:
    """Pure ASGI middleware: counts responses by known path and status."""

    def __init__(self, app: ASGIApp, *, count: Callable[[str, int], None]) -> None:
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in _COUNTED else "other"

        def send_counted(message: Message) -> Any:
            if message["type"] == "http.response.start":
                self._count(path, message["status"])
            return send(message)

        await self._app(scope, receive, send_counted)
