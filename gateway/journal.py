"""What one request did, written down as it happens and read once at its end.

The journal's owner is the request's task. Headers, the ``coe`` object of an answer, the decision
record, metrics and the log line are all made from it, so they cannot disagree.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from experts.errors import CoeError
from experts.protocol import CallTimings
from experts.types import MICRO_USD_PER_USD, ExpertSpec, Needs, Usage
from gateway.affinity import AffinityOutcome, AffinityView, Conversation
from gateway.keys import Access, RateState
from gateway.wire import WireRequest
from policies.types import Candidate, ExpertTerms, Plan, Stage
from routers.types import Classification

__all__ = ["CURRENT", "Admission", "Decision", "Journal", "RequestTrace", "StageNote"]

_POSTERIOR_KEPT = 5


class Decision(msgspec.Struct, frozen=True):
    """How a request is to be answered, and why. ``experts`` are the specs of the plan's stages.

    ``classification`` is None when nothing was routed: a named expert, or no router configured.
    """

    plan: Plan
    experts: tuple[ExpertSpec, ...]
    classification: Classification | None
    candidates: tuple[Candidate, ...]
    exclusions: Mapping[str, str]
    prompt_tokens: int
    max_output_tokens: int  # per choice
    asked_policy: str | None = None  # None: the caller named an expert and no policy
    named_expert: str | None = None
    limits_fail_open: bool = False  # a key's limits may go unchecked while the store is away
    needs: Needs | None = None  # what experts were held against
    affinity: AffinityView = AffinityView(AffinityOutcome.OFF)
    affinity_ttl_ms: int = 0  # 0: who answers is not remembered


@dataclass(frozen=True, slots=True)
class Admission:
    """A request's place under its key, to be settled once. ``asking`` may still be under way."""

    id: str
    digest: str = field(repr=False)
    asking: asyncio.Future[Any]


@dataclass(slots=True)
class StageNote:
    """One attempt. ``verdict``: accept, escalate, failed or aborted; empty while it runs."""

    expert: str
    started_ms: float
    host: str = ""
    verdict: str = ""
    mean_logprob: float | None = None
    confidence: float | None = None  # calibrated; None: not judged
    agreement: float | None = None  # with whole drafts of earlier stages
    usage: Usage = field(default_factory=Usage)
    usage_is_estimated: bool = False
    cost_micro_usd: int = 0
    queue_ms: float = 0.0
    swap_ms: float = 0.0
    first_event_ms: float | None = None  # of a stream
    ended_ms: float | None = None
    error: str | None = None
    retries: int = 0  # calls beyond the first, at the same expert after a pause
    moves: int = 0  # from a host where it waited to one that had fallen idle

    def took(self, timings: CallTimings) -> None:
        self.host, self.queue_ms, self.swap_ms = timings.host, timings.queue_ms, timings.swap_ms


class RequestTrace(Protocol):
    """A request's spans while it runs; ``gateway.tracing`` makes them."""

    trace_id: str

    def began_stage(self, stage: StageNote) -> str:
        """The ``traceparent`` to send with the stage's call."""
        ...


@dataclass(slots=True)
class Journal:
    """One request from arrival to its last byte. Times are monotonic milliseconds."""

    request_id: str
    decision_id: str
    endpoint: str
    arrived_ms: float
    wall_ms: int
    access: Access = field(default_factory=Access)
    admission: Admission | None = None  # the gate's; gone once settled
    rates: Mapping[str, RateState] = field(default_factory=dict)
    request: WireRequest | None = None
    decision: Decision | None = None
    decided_ms: float | None = None
    router_ms: float = 0.0
    stages: list[StageNote] = field(default_factory=list)
    served: StageNote | None = None
    first_token_ms: float | None = None
    ended_ms: float | None = None
    outcome: str = ""  # ok, error or client_closed
    error: CoeError | None = None
    dearest_micro_usd: int = 0  # what the catalogue's dearest expert would charge for the answer
    trace: RequestTrace | None = None  # None: not traced
    client_session: str | None = None  # the conversation's id by a header
    conversation: Conversation | None = None

    @property
    def spent_micro_usd(self) -> int:
        if len(self.stages) == 1:  # as most requests have; this is asked several times for each
            return self.stages[0].cost_micro_usd
        return sum(stage.cost_micro_usd for stage in self.stages)

    @property
    def paid(self) -> bool:
        """An expert has generated something for this request, so a retry would cost again."""
        return any(stage.usage.output_tokens for stage in self.stages)

    @property
    def usage(self) -> Usage:
        if len(self.stages) == 1:
            return self.stages[0].usage
        total = Usage()
        for stage in self.stages:
            total += stage.usage
        return total

    @property
    def experts_ms(self) -> float:
        """Time under calls of experts; what is missing to the whole is the gateway's own."""
        return sum(s.ended_ms - s.started_ms for s in self.stages if s.ended_ms is not None)

    @property
    def queue_ms(self) -> float:
        return sum(stage.queue_ms for stage in self.stages)

    @property
    def swap_ms(self) -> float:
        return sum(stage.swap_ms for stage in self.stages)


CURRENT: ContextVar[Journal | None] = ContextVar("journal", default=None)
"""The request that the running task serves, so that every log line can name it."""


def coe_object(journal: Journal) -> dict[str, Any]:
    """The ``coe`` object of an answer's body: who answered, by which way, for how much."""
    plan = _plan(journal)
    total = journal.usage
    coe: dict[str, Any] = {
        "decision_id": journal.decision_id,
        "expert": journal.served.expert if journal.served else None,
        "category": plan.category,
        "policy": plan.policy,
        "stages": len(journal.stages),
        "cost_usd": journal.spent_micro_usd / MICRO_USD_PER_USD,
        "usage": {"prompt_tokens": total.input_tokens, "completion_tokens": total.output_tokens},
    }
    if journal.request is not None and journal.request.coe.explain:
        coe["explain"] = explanation(journal)
    return coe


def coe_head(journal: Journal) -> dict[str, Any]:
    """The ``coe`` object of a stream's first chunk: what is known before the answer's end."""
    coe = coe_object(journal)
    del coe["cost_usd"], coe["usage"]
    return coe


def explanation(journal: Journal) -> dict[str, Any]:
    """Why this plan: what the router saw, who was left out and why, what each wait would be."""
    decision = journal.decision
    if decision is None:
        raise RuntimeError("nothing was decided yet")
    return {
        "category": decision.plan.category,
        "router": _router_view(decision.classification, full=True),
        "router_ms": round(journal.router_ms, 3),
        "policy": decision.plan.policy,
        "policy_digest": decision.plan.policy_digest,
        "prompt_tokens": decision.prompt_tokens,
        "max_output_tokens": decision.max_output_tokens,
        "needs": _needs_view(decision.needs),
        "eligible": [
            {
                "expert": c.spec.id,
                "available": c.available,
                "why_not": c.why_not or (None if c.available else "no live host"),
                "resident": c.resident,
                "expected_wait_ms": round(c.expected_wait_ms, 1),
            }
            for c in decision.candidates
        ],
        "excluded": dict(decision.exclusions),
        "affinity": _affinity_view(decision.affinity),
        "plan": _plan_view(decision.plan),
        "terms": [_terms_view(terms) for terms in decision.plan.terms],
    }


def decision_record(journal: Journal) -> dict[str, Any]:
    """One line of the decision log. Holds no prompt: ``input_sha256`` recognises one."""
    request, decision = journal.request, journal.decision
    end_ms = journal.ended_ms if journal.ended_ms is not None else journal.arrived_ms
    total = journal.usage
    record: dict[str, Any] = {
        "decision_id": journal.decision_id,
        "request_id": journal.request_id,
        "at_ms": journal.wall_ms,
        "endpoint": journal.endpoint,
        "key_id": journal.access.key.id if journal.access.key else None,
        "outcome": journal.outcome,
        "error": type(journal.error).__name__ if journal.error else None,
        "expert": journal.served.expert if journal.served else None,
        "stages": [_stage_view(stage) for stage in journal.stages],
        "input_tokens": total.input_tokens,
        "output_tokens": total.output_tokens,
        "cost_micro_usd": journal.spent_micro_usd,
        "dearest_micro_usd": journal.dearest_micro_usd,
        "router_ms": round(journal.router_ms, 3),
        "queue_ms": journal.queue_ms,
        "swap_ms": journal.swap_ms,
        "first_token_ms": _since(journal, journal.first_token_ms),
        "total_ms": round(end_ms - journal.arrived_ms, 3),
    }
    if request is not None:
        record |= {
            "model": request.model,
            "stream": request.stream,
            "session_id": request.coe.session_id,
            "input_sha256": hashlib.sha256(request.routing_text.encode()).hexdigest(),
        }
    if decision is not None:
        record |= {
            "category": decision.plan.category,
            "policy": decision.plan.policy,
            "policy_digest": decision.plan.policy_digest,
            "router": _router_view(decision.classification, full=False),
            "prompt_tokens_estimate": decision.prompt_tokens,
            "plan": _plan_view(decision.plan),
            "excluded": dict(decision.exclusions),
            "affinity": _affinity_view(decision.affinity),
        }
    return record


def _plan(journal: Journal) -> Plan:
    if journal.decision is None:
        raise RuntimeError("nothing was decided yet")
    return journal.decision.plan


def _since(journal: Journal, moment_ms: float | None) -> float | None:
    return None if moment_ms is None else round(moment_ms - journal.arrived_ms, 3)


def _router_view(classification: Classification | None, *, full: bool) -> dict[str, Any] | None:
    if classification is None:
        return None
    ranked = sorted(classification.posterior.items(), key=lambda item: -item[1])
    return {
        "category": classification.category,
        "best_guess": classification.best_guess,
        "gate": classification.gate,
        "entropy": classification.entropy,
        "similarity": classification.similarity,
        "cached": classification.cached,
        "posterior": dict(ranked if full else ranked[:_POSTERIOR_KEPT]),
    }


def _needs_view(needs: Needs | None) -> dict[str, Any] | None:
    if needs is None:
        return None
    return {
        "capabilities": sorted(capability.value for capability in needs.capabilities),
        "context_tokens": needs.prompt_tokens + needs.output_tokens,
        "required_tags": sorted(needs.required_tags),
        "language": needs.language,
    }


def _affinity_view(view: AffinityView) -> dict[str, Any]:
    return {
        "outcome": view.outcome.value,
        "source": view.source or None,
        "expert": view.expert,
        "reason": view.reason or None,
    }


def _plan_view(plan: Plan) -> dict[str, Any]:
    return {
        "stages": [
            {
                "expert": stage.expert,
                "min_confidence": stage.accept.min_confidence if stage.accept else None,
                **_following_view(stage),
                "worst_case_usd": cost / MICRO_USD_PER_USD,
            }
            for stage, cost in zip(plan.stages, plan.stage_costs_micro_usd, strict=True)
        ],
        "worst_case_usd": plan.worst_case_micro_usd / MICRO_USD_PER_USD,
        "caps": {
            "stages": plan.caps.stages,
            "cost_usd": plan.caps.cost_micro_usd / MICRO_USD_PER_USD,
            "deadline_ms": plan.caps.deadline_ms,
        },
        "notes": list(plan.notes),
    }


def _following_view(stage: Stage) -> dict[str, Any]:
    """How the bound moves with the confidence of the answer before, where it does."""
    following = stage.accept.following if stage.accept else None
    if following is None:
        return {}
    return {
        "min_confidence_follows": {
            "per_confidence": round(following.per_confidence, 4),
            "expected": round(following.expected, 4),
        }
    }


def _terms_view(terms: ExpertTerms) -> dict[str, Any]:
    """One expert's place in a per-query policy's objective: value = quality - money - latency."""
    return {
        "expert": terms.expert,
        "quality": round(terms.quality, 4),
        "quality_from": "router" if terms.from_router else "policy",
        "expected_cost_usd": terms.cost_micro_usd / MICRO_USD_PER_USD,
        "expected_wait_ms": round(terms.expected_wait_ms, 1),
        "resident": terms.resident,
        "money_term": round(terms.money_term, 4),
        "latency_term": round(terms.latency_term, 4),
        "value": round(terms.value, 4),
    }


def _stage_view(stage: StageNote) -> dict[str, Any]:
    end_ms = stage.ended_ms if stage.ended_ms is not None else stage.started_ms
    return {
        "expert": stage.expert,
        "host": stage.host,
        "verdict": stage.verdict,
        "mean_logprob": stage.mean_logprob,
        "confidence": stage.confidence,
        "agreement": stage.agreement,
        "input_tokens": stage.usage.input_tokens,
        "output_tokens": stage.usage.output_tokens,
        "usage_is_estimated": stage.usage_is_estimated,
        "cost_micro_usd": stage.cost_micro_usd,
        "queue_ms": stage.queue_ms,
        "swap_ms": stage.swap_ms,
        "ms": round(end_ms - stage.started_ms, 3),
        "error": stage.error,
        "retries": stage.retries,
        "moves": stage.moves,
    }
