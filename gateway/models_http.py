"""``GET /v1/models``: what ``model`` may say, in OpenAI's shape or in Anthropic's.

Both APIs have the same paths; Anthropic's clients always send ``anthropic-version``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from experts.errors import InvalidRequest, UnknownModel
from experts.types import ExpertSpec
from gateway.anthropic_errors import names_version
from gateway.headers import request_id_of
from gateway.keys import sent_secret
from gateway.service import GatewayService

__all__ = ["add_models"]

_PAGE_MAX = 1_000
_RELEASED = "1970-01-01T00:00:00Z"  # Anthropic's own stand-in for a date that nobody knows


def add_models(app: FastAPI, service: GatewayService) -> None:
    """Both endpoints. With a key, only what it permits is there."""

    async def names_for(request: Request) -> tuple[str, ...]:
        access = await service.authenticate(sent_secret(request.scope["headers"]))
        return service.model_names(access)

    @app.get("/v1/models")
    async def list_models(request: Request) -> Response:
        names = await names_for(request)
        if not names_version(request.scope["headers"]):
            data = [_openai_model(name, service.expert(name)) for name in names]
            return JSONResponse({"object": "list", "data": data})
        shown, has_more = _page(names, request.query_params)
        return _for_anthropic(
            request,
            {
                "data": [_anthropic_model(name, service.expert(name)) for name in shown],
                "has_more": has_more,
                "first_id": shown[0] if shown else None,
                "last_id": shown[-1] if shown else None,
            },
        )

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str, request: Request) -> Response:
        if name not in (names := await names_for(request)):
            raise UnknownModel(name, names)
        if not names_version(request.scope["headers"]):
            return JSONResponse(_openai_model(name, service.expert(name)))
        return _for_anthropic(request, _anthropic_model(name, service.expert(name)))


def _for_anthropic(request: Request, body: dict[str, Any]) -> Response:
    return JSONResponse(body, headers={"request-id": request_id_of(request.scope)})


def _openai_model(name: str, spec: ExpertSpec | None) -> dict[str, Any]:
    model = {"id": name, "object": "model", "created": 0, "owned_by": "coe"}
    return model | {"coe": _about(spec)}


def _anthropic_model(name: str, spec: ExpertSpec | None) -> dict[str, Any]:
    """``max_tokens`` stays open: an expert's output is bounded by its context and the policy."""
    return {
        "id": name,
        "type": "model",
        "display_name": name,
        "created_at": _RELEASED,
        "lifecycle": "active",
        "max_input_tokens": spec.context_tokens if spec is not None else None,
        "max_tokens": None,
        "coe": _about(spec),
    }


def _about(spec: ExpertSpec | None) -> dict[str, Any]:
    """What only we tell; None: a policy."""
    if spec is None:
        return {"kind": "policy"}
    return {
        "kind": "expert",
        "context_tokens": spec.context_tokens,
        "capabilities": sorted(capability.value for capability in spec.capabilities),
        "input_usd_per_mtok": spec.price.input_micro_usd_per_mtok / 1e6,
        "output_usd_per_mtok": spec.price.output_micro_usd_per_mtok / 1e6,
        "description": spec.description,
    }


def _page(names: Sequence[str], asked: Mapping[str, str]) -> tuple[Sequence[str], bool]:
    """Anthropic's pages: ``limit`` names after ``after_id``, or right before ``before_id``.

    Returns whether more lie in the direction that was asked for. Unlike Anthropic's, a page without
    ``limit`` is as long as one may be. Raises InvalidRequest.
    """
    limit = asked.get("limit", str(_PAGE_MAX))
    if not (limit.isascii() and limit.isdigit() and 1 <= int(limit[:5]) <= _PAGE_MAX):
        raise InvalidRequest("limit", f"a whole number from 1 to {_PAGE_MAX} is required")
    count, begin, end = int(limit), 0, len(names)
    for field_name in ("after_id", "before_id"):
        if field_name in asked and asked[field_name] not in names:
            raise InvalidRequest(field_name, "is not in the list")
    if "before_id" in asked:
        end = names.index(asked["before_id"])
        return names[max(0, end - count) : end], end > count
    if "after_id" in asked:
        begin = names.index(asked["after_id"]) + 1
    return names[begin : begin + count], end > begin + count
