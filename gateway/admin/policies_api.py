"""Policies over HTTP: see, check, activate, roll back, try on a share of the sessions.

Changes go to the shared store, so every worker of every gateway follows within a second. ``ETag``
names what was read; ``If-Match`` makes a change fail with 412 when it is that no more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from experts.errors import ConfigError, InvalidRequest, RevisionChanged
from gateway.admin.parts import AdminParts
from gateway.policy_versions import (
    TEXT_BYTES_MAX,
    PolicyRecord,
    Version,
    activated,
    check_name,
    etag,
    released,
    revision_of,
    rolled_back,
    with_canary,
    without_canary,
)
from policies.loader import dump_policy, parse_policy
from policies.types import Policy

__all__ = ["policies_router"]


class VersionBody(BaseModel):
    """A version: a new one by its ``text`` (YAML), or one that the store keeps by its digest."""

    model_config = ConfigDict(extra="forbid")
    text: str | None = Field(None, max_length=TEXT_BYTES_MAX)
    digest: str | None = Field(None, max_length=64)


class CanaryBody(VersionBody):
    share: float = Field(gt=0, le=1)


def policies_router(parts: AdminParts) -> APIRouter:
    """The routes below ``/policies``."""
    router = APIRouter()
    desk = _Desk(parts)

    @router.get("/policies")
    async def list_policies() -> JSONResponse:
        return JSONResponse(await desk.listed())

    @router.get("/policies/{name}")
    async def get_policy(name: str) -> JSONResponse:
        return desk.answer(await parts.policy_store.get(check_name(name)))

    @router.post("/policies/{name}/validate")
    async def validate(name: str, body: VersionBody) -> JSONResponse:
        if body.text is None:
            raise InvalidRequest("text", "the policy to check is missing")
        policy = desk.parsed(check_name(name), body.text)
        return JSONResponse({"name": name, "digest": policy.digest, "text": dump_policy(policy)})

    @router.post("/policies/{name}/activate")
    async def activate(name: str, body: VersionBody, request: Request) -> JSONResponse:
        def order(record: PolicyRecord) -> PolicyRecord:
            return activated(record, desk.version(record, body), parts.wall_ms())

        return await desk.change(name, order, request)

    @router.post("/policies/{name}/rollback")
    async def roll_back(name: str, request: Request) -> JSONResponse:
        return await desk.change(name, desk.with_something_left(rolled_back), request)

    @router.post("/policies/{name}/release")
    async def release(name: str, request: Request) -> JSONResponse:
        def order(record: PolicyRecord) -> PolicyRecord:
            return released(record, parts.wall_ms())

        return await desk.change(name, desk.with_something_left(order), request)

    @router.post("/policies/{name}/canary")
    async def canary(name: str, body: CanaryBody, request: Request) -> JSONResponse:
        def order(record: PolicyRecord) -> PolicyRecord:
            if name not in parts.policies.current:
                raise InvalidRequest("name", f"no policy {name!r} is in force beside a canary")
            return with_canary(record, desk.version(record, body), body.share)

        return await desk.change(name, order, request)

    @router.delete("/policies/{name}/canary")
    async def end_canary(name: str, request: Request) -> JSONResponse:
        return await desk.change(name, without_canary, request)

    return router


class _Desk:
    """Reads bodies, carries orders out, shows records."""

    def __init__(self, parts: AdminParts) -> None:
        self._parts = parts

    async def listed(self) -> dict[str, Any]:
        _, records = await self._parts.policy_store.read()
        current, watcher = self._parts.policies.current, self._parts.policies
        names = sorted({*current.names, *(records or {})})
        known = records or {}
        return {
            "default": current.default,
            "policies": [self._view(known.get(n, PolicyRecord(n)), texts=False) for n in names],
            "errors": {where: error.message for where, error in watcher.errors.items()},
        }

    def answer(self, record: PolicyRecord) -> JSONResponse:
        tag = etag(record.revision, self._file_digest(record.name))
        return JSONResponse(self._view(record, texts=True), headers={"etag": tag})

    def parsed(self, name: str, text: str) -> Policy:
        """Raises InvalidRequest with the line and key at fault."""
        if len(text.encode()) > TEXT_BYTES_MAX:
            raise InvalidRequest("text", f"more than {TEXT_BYTES_MAX} bytes")
        try:
            return parse_policy(text, name=name, file=name, catalogue_ids=self._parts.catalogue.ids)
        except ConfigError as error:
            raise InvalidRequest("text", error.message) from error

    def version(self, record: PolicyRecord, body: VersionBody) -> Version:
        """The version that a body names; checked against the experts of today either way."""
        if (body.text is None) == (body.digest is None):
            raise InvalidRequest(None, "give either text or digest")
        text = body.text if body.text is not None else record.version(body.digest or "").text
        policy = self.parsed(record.name, text)
        return Version(policy.digest, text, self._parts.wall_ms())

    def with_something_left(
        self, order: Callable[[PolicyRecord], PolicyRecord]
    ) -> Callable[[PolicyRecord], PolicyRecord]:
        """Refuses an order that would leave no policy under a name that must have one."""

        def checked(record: PolicyRecord) -> PolicyRecord:
            after = order(record)
            default = self._parts.policies.current.default
            if after.active is None and record.name == default and not self._file_digest(default):
                raise InvalidRequest(None, f"{default!r} is the default policy and has no file")
            return after

        return checked

    async def change(
        self, name: str, order: Callable[[PolicyRecord], PolicyRecord], request: Request
    ) -> JSONResponse:
        revision = self._demanded(check_name(name), request.headers.get("if-match"))
        record = await self._parts.policy_store.change(name, order, revision=revision)
        await self._parts.follower.refresh()
        return self.answer(record)

    def _demanded(self, name: str, if_match: str | None) -> int | None:
        if if_match is None or if_match.strip() == "*":
            return None
        revision = revision_of(if_match, self._file_digest(name))
        if revision is None:
            raise RevisionChanged(f"policy {name!r}")
        return revision

    def _file_digest(self, name: str) -> str | None:
        policy = self._parts.policies.files.get(name)
        return None if policy is None else policy.digest

    def _view(self, record: PolicyRecord, *, texts: bool) -> dict[str, Any]:
        current, name = self._parts.policies.current, record.name
        stable = current.get(name) if name in current else None
        view: dict[str, Any] = {
            "name": name,
            "revision": record.revision,
            "digest": stable.digest if stable else None,
            "source": "store" if name in current.from_store else "file" if stable else None,
            "file_digest": self._file_digest(name),
            "description": stable.description if stable else "",
            "canary": {"digest": record.canary, "share": record.canary_share}
            if record.canary
            else None,
            "versions": [{"digest": v.digest, "at_ms": v.at_ms} for v in record.versions],
            "history": [{"digest": s.digest, "until_ms": s.until_ms} for s in record.history],
        }
        if texts:
            view["text"] = dump_policy(stable) if stable else None
        return view
