"""What one request did, written down as it happens and read once at its end.

The journal's owner is the request's task. Headers, the ``coe`` object of an answer, the decision
record, metrics and the log line are all made from it, so they cannot disagree.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from experts.errors import CoeError
from experts.protocol import CallTimings
from experts.types import MICRO_USD_PER_USD, ExpertSpec, Usage
from gateway.keys import Access, RateState
from gateway.wire import WireRequest
from policies.types import Candidate, Plan
from routers.types import Classification

__all__ = ["Admission", "Decision", "Journal", "StageNote"]

_POSTERIOR_KEPT = 5


@dataclass(frozen=True, slots=True)
class Decision:
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
    usage: Usage = field(default_factory=Usage)
    usage_is_estimated: bool = False
    cost_micro_usd: int = 0
    queue_ms: float = 0.0
    swap_ms: float = 0.0
    ended_ms: float | None = None
    error: str | None = None

    def took(self, timings: CallTimings) -> None:
        self.host, self.queue_ms, self.swap_ms = timings.host, timings.queue_ms, timings.swap_ms


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
    router_ms: float = 0.0
    stages: list[StageNote] = field(default_factory=list)
    served: StageNote | None = None
    first_token_ms: float | None = None
    ended_ms: float | None = None
    outcome: str = ""  # ok, error or client_closed
    error: CoeError | None = None

    @property
    def spent_micro_usd(self) -> int:
        return sum(stage.cost_micro_usd for stage in self.stages)

    @property
    def paid(self) -> bool:
        """An expert has generated something for this request, so a retry would cost again."""
        return any(stage.usage.output_tokens for stage in self.stages)

    @property
    def usage(self) -> Usage:
        total = Usage()
        for stage in self.stages:
            total += stage.usage
        return total

    @property
    def queue_ms(self) -> float:
        return sum(stage.queue_ms for stage in self.stages)

    @property
    def swap_ms(self) -> float:
        return sum(stage.swap_ms for stage in self.stages)


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
        "eligible": [
            {
                "expert": c.spec.id,
                "available": c.available,
                "resident": c.resident,
                "expected_wait_ms": round(c.expected_wait_ms, 1),
            }
            for c in decision.candidates
        ],
        "excluded": dict(decision.exclusions),
        "plan": _plan_view(decision.plan),
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


def _plan_view(plan: Plan) -> dict[str, Any]:
    return {
        "stages": [
            {
                "expert": stage.expert,
                "min_confidence": stage.accept.min_confidence if stage.accept else None,
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


def _stage_view(stage: StageNote) -> dict[str, Any]:
    end_ms = stage.ended_ms if stage.ended_ms is not None else stage.started_ms
    return {
        "expert": stage.expert,
        "host": stage.host,
        "verdict": stage.verdict,
        "mean_logprob": stage.mean_logprob,
        "input_tokens": stage.usage.input_tokens,
        "output_tokens": stage.usage.output_tokens,
        "usage_is_estimated": stage.usage_is_estimated,
        "cost_micro_usd": stage.cost_micro_usd,
        "queue_ms": stage.queue_ms,
        "swap_ms": stage.swap_ms,
        "ms": round(end_ms - stage.started_ms, 3),
        "error": stage.error,
    }
