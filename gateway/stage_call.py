"""What is sent to an expert for one stage of a plan, and how long it may take. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experts.protocol import ExpertCall
from experts.types import Endpoint
from gateway.journal import Decision
from gateway.wire import WireRequest
from policies.answer_features import ENTROPY_TOP
from policies.types import Attempt

__all__ = ["Timeouts", "is_judged", "is_short_of_time", "stage_call"]

_OUTPUT_BOUNDS = ("max_tokens", "max_completion_tokens")


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Bounds of one call, in milliseconds."""

    total_ms: float
    first_token_ms: float
    idle_ms: float


def stage_call(
    request: WireRequest,
    decision: Decision,
    attempt: Attempt,
    *,
    request_id: str,
    timeouts: Timeouts,
    traceparent: str | None = None,
) -> ExpertCall:
    """The call of a stage. Adds what judging and exact accounting need to the caller's body."""
    total_ms = min(attempt.timeout_ms, timeouts.total_ms)
    first_ms = min(timeouts.first_token_ms, total_ms)
    return ExpertCall(
        expert=attempt.stage.expert,
        endpoint=request.endpoint,
        body=_stage_body(request, decision, alternatives=_alternatives(attempt)),
        request_id=request_id,
        timeout_ms=total_ms,
        first_token_timeout_ms=first_ms if request.stream else total_ms,
        idle_timeout_ms=timeouts.idle_ms,
        queue_deadline_ms=first_ms,
        traceparent=traceparent,
        likely_next=_likely_next(decision, attempt),
    )


def _likely_next(decision: Decision, attempt: Attempt) -> str | None:
    """Who is asked if this stage's answer does not pass; its host can make ready meanwhile."""
    return decision.plan.stages[attempt.index + 1].expert if is_judged(attempt) else None


def is_short_of_time(
    request: WireRequest, decision: Decision, attempt: Attempt, timeouts: Timeouts
) -> bool:
    """Whether a timeout of this call would say more about its deadline than about the expert."""
    if request.coe.overrides.deadline_ms is not None:
        return True
    usual_ms = min(timeouts.first_token_ms, timeouts.total_ms, decision.plan.caps.deadline_ms)
    return attempt.timeout_ms < usual_ms / 2


def is_judged(attempt: Attempt) -> bool:
    return attempt.stage.accept is not None and not attempt.is_last


def _alternatives(attempt: Attempt) -> int | None:
    """How many alternatives of each token judging reads; None: the stage is not judged."""
    rule = attempt.stage.accept
    if rule is None or attempt.is_last:
        return None
    return ENTROPY_TOP if rule.calibration.reads_entropy else 0


def _stage_body(
    request: WireRequest, decision: Decision, *, alternatives: int | None
) -> dict[str, Any]:
    body = dict(request.body)
    if request.endpoint is not Endpoint.EMBEDDINGS:
        body |= _output_bound(body, request.endpoint, decision.max_output_tokens)
    if request.stream:
        body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    if alternatives is not None and not request.wants_logprobs:
        body |= _logprobs_asked(request.endpoint, alternatives)
    return body


def _logprobs_asked(endpoint: Endpoint, alternatives: int) -> dict[str, Any]:
    if endpoint is not Endpoint.CHAT:
        return {"logprobs": max(1, alternatives)}  # some servers read 0 as "none"
    top = {"top_logprobs": alternatives} if alternatives else {}
    return {"logprobs": True, **top}


def _output_bound(body: Mapping[str, Any], endpoint: Endpoint, tokens: int) -> dict[str, int]:
    """The bound that was reserved for, in every spelling that an expert might go by.

    Servers differ in which one they prefer when a body has both, so a second one that says more
    would be answers that nobody pays for. Completions know the old spelling alone.
    """
    said = {name: tokens for name in _OUTPUT_BOUNDS if body.get(name) is not None}
    if not said or endpoint is Endpoint.COMPLETIONS:
        said["max_tokens"] = tokens
    return said
