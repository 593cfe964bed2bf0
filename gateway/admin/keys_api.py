"""Keys over HTTP: create, list, revoke; the same records that ``coe keys`` works on."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from experts.errors import InvalidRequest
from experts.quantities import micro_usd, parse_usd
from gateway.admin.parts import AdminParts
from gateway.key_views import key_view, usage_view
from gateway.keys import (
    BUDGET_MAX_MICRO_USD,
    NAME_CHARS_MAX,
    RATE_MAX,
    SECRET_BYTES,
    KeyBudgets,
    KeyLimits,
    KeyScope,
    digest_of,
    key_secret,
)
from gateway.state.keys import KeyTaken

__all__ = ["keys_router"]

LISTED_MAX = 200


def _usd(value: Any) -> Any:
    """Money is written as text, so that it stays exact: "12.50"."""
    if not isinstance(value, str):
        raise ValueError('expected US dollars as text, such as "12.50"')
    return parse_usd(value)


Usd = Annotated[Decimal, BeforeValidator(_usd)]
Count = Annotated[int, Field(ge=1, le=RATE_MAX, strict=True)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BudgetsBody(_Body):
    """US dollars per UTC window; a window that is left out has no bound."""

    hour: Usd | None = None
    day: Usd | None = None
    month: Usd | None = None
    total: Usd | None = None

    def parsed(self) -> KeyBudgets:
        amounts = (self.hour, self.day, self.month, self.total)
        micro = [None if usd is None else micro_usd(usd) for usd in amounts]
        if any(amount is not None and amount > BUDGET_MAX_MICRO_USD for amount in micro):
            raise InvalidRequest("budgets_usd", "more than can be counted exactly")
        return KeyBudgets(*micro)


class KeyBody(_Body):
    """A key to create. ``policies`` and ``experts``: names; left out: all."""

    name: str = Field(min_length=1, max_length=NAME_CHARS_MAX)
    policies: tuple[str, ...] | None = Field(None, min_length=1, max_length=256)
    experts: tuple[str, ...] | None = Field(None, min_length=1, max_length=1024)
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrent_requests: Count | None = None
    budgets_usd: BudgetsBody = BudgetsBody()


def keys_router(parts: AdminParts) -> APIRouter:
    """The routes below ``/keys``."""
    router = APIRouter()

    @router.get("/keys")
    async def list_keys() -> JSONResponse:
        records = await parts.keys.list()
        newest = sorted(records, key=lambda r: -r.created_ms)[:LISTED_MAX]
        used = [await parts.ledger.usage(record.digest) for record in newest]
        listed = [key_view(k) | usage_view(u) for k, u in zip(newest, used, strict=True)]
        return JSONResponse({"keys": listed, "all": len(records)})

    @router.post("/keys")
    async def create_key(body: KeyBody) -> JSONResponse:
        if not body.name.isprintable():
            raise InvalidRequest("name", "has characters that cannot be printed")
        scope = KeyScope(_names(body.policies), _names(body.experts))
        _check_names(scope, parts)
        limits = KeyLimits(
            body.requests_per_minute, body.tokens_per_minute, body.concurrent_requests
        )
        secret = key_secret(parts.random_bytes(SECRET_BYTES))
        try:
            record = await parts.keys.create(
                digest_of(secret), body.name, scope, limits, body.budgets_usd.parsed()
            )
        except KeyTaken as error:
            raise InvalidRequest(None, str(error)) from error
        shown_once = {"cache-control": "no-store"}
        return JSONResponse(key_view(record) | {"secret": secret}, 201, headers=shown_once)

    @router.post("/keys/{key_id}/revoke")
    async def revoke_key(key_id: str) -> JSONResponse:
        revoked_ms = await parts.keys.revoke(key_id)
        if revoked_ms is None:
            raise InvalidRequest("key_id", f"there is no key {key_id[:64]!r}")
        return JSONResponse({"id": key_id, "revoked_ms": revoked_ms})

    return router


def _names(given: tuple[str, ...] | None) -> frozenset[str] | None:
    return None if given is None else frozenset(given)


def _check_names(scope: KeyScope, parts: AdminParts) -> None:
    """A key for a name that does not exist would be a key for nothing."""
    for field, asked, known in (
        ("policies", scope.policies, parts.policies.current.names),
        ("experts", scope.experts, parts.catalogue.ids),
    ):
        if unknown := sorted((asked or frozenset()) - set(known)):
            raise InvalidRequest(field, f"no {unknown[0]!r}; known are {', '.join(known)}")
