"""Explaining a decision without a running gateway: the same decider, over a catalogue at rest."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from typing import Any

from experts.errors import HostUnavailable
from experts.types import ExpertSpec
from gateway.backends import Lease
from gateway.config import Config
from gateway.openai_http import parse_route_request
from gateway.service import ServiceLimits, build_service
from gateway.wiring import clock
from policies.live import PolicyWatcher
from policies.types import Candidate
from routers.router import SemanticRouter


class AtRest:
    """Every expert counts as available; none can be called."""

    def candidate(self, spec: ExpertSpec) -> Candidate:
        return Candidate(spec)

    def lease(self, spec: ExpertSpec, *, exclude: Iterable[str] = ()) -> Lease:
        raise HostUnavailable(spec.id)

    def suspect(self, host: str) -> None:
        raise HostUnavailable(host)


async def explain(config: Config, body: dict[str, Any]) -> dict[str, Any]:
    """What ``POST /v1/route`` would say if every expert were up. Raises CoeError."""
    policies = PolicyWatcher(config.policies.dir, config.catalogue.ids, config.policies.default)
    router = SemanticRouter.load(config.router.artifact)
    try:
        service = build_service(
            catalogue=config.catalogue,
            policies=lambda: policies.current,
            router=router,
            experts=AtRest(),
            limits=ServiceLimits(prompt_chars=config.gateway.limits.prompt_chars),
            clock=clock(),
            new_id=lambda: uuid.uuid4().hex,
        )
        request = parse_route_request(json.dumps(body).encode())
        with service.journal("route", "offline") as journal:
            return await service.explain(request, journal)
    finally:
        await router.aclose()
