"""What may turn a plan away from the policy's map: a conversation's own expert, or curiosity.

``Steering.begin`` asks who answered before; ``Course.plan`` decides. Whatever leads, the plan is
made by the policy's own planner, so its caps hold.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec

from experts.errors import CoeError
from experts.types import Endpoint
from gateway.affinity import (
    AffinityOutcome,
    AffinityView,
    Conversation,
    Session,
    conversation_of,
    expert_values,
    sticky_policy,
    worth_keeping,
)
from gateway.feedback import Beta, draw_expert
from gateway.journal import Journal
from gateway.wire import WireRequest
from policies.types import Candidate, Plan, Policy

__all__ = ["Course", "Sessions", "Steering"]

_OFF = AffinityView(AffinityOutcome.OFF)


class Sessions(Protocol):
    """Remembers conversations; ``gateway.state.affinity.SessionMemory`` is one."""

    async def recall(self, key: str, /) -> Session | None: ...


class NoSessions:
    async def recall(self, key: str, /) -> Session | None:
        return None


class Course(msgspec.Struct, frozen=True):
    """What is known before planning: the conversation, who answered last, who shall be tried."""

    policy: Policy
    conversation: Conversation | None = None
    session: Session | None = None
    off: bool = False
    explores: bool = False

    @property
    def experts(self) -> tuple[str, ...]:
        """Experts to look at beyond those of the category's route."""
        if self.explores:
            return self.policy.named_experts
        session = self.session
        known = session is not None and session.expert in self.policy.named_experts
        return (session.expert,) if session is not None and known else ()

    def plan(
        self,
        make: Callable[[Policy], Plan],
        category: str,
        posterior: Mapping[str, float],
        candidates: Sequence[Candidate],
        draw: Callable[[Sequence[str]], str | None],
    ) -> tuple[Plan, AffinityView]:
        """Raises what ``make`` raises for the policy itself."""
        if self.explores and (tried := self._explored(make, category, candidates, draw)):
            return tried
        fresh = make(self.policy)
        if self.off:
            return fresh, _OFF
        if self.conversation is None:
            return fresh, AffinityView(AffinityOutcome.NONE)
        if self.session is None:
            return fresh, AffinityView(AffinityOutcome.NEW, self.conversation.source)
        return self._kept_or(fresh, make, category, posterior, candidates)

    def _kept_or(
        self,
        fresh: Plan,
        make: Callable[[Policy], Plan],
        category: str,
        posterior: Mapping[str, float],
        candidates: Sequence[Candidate],
    ) -> tuple[Plan, AffinityView]:
        assert self.session is not None
        held, first = self.session.expert, fresh.stages[0].expert
        if held == first:
            return fresh, self._view(AffinityOutcome.SAME, "the policy would choose it anyway")
        by_id = {candidate.spec.id: candidate for candidate in candidates}
        if held not in by_id or not by_id[held].available:
            return fresh, self._view(AffinityOutcome.UNABLE, "it cannot take this request now")
        values = expert_values(self.policy, posterior)
        keep, reason = worth_keeping(
            self.policy.affinity,
            gain=values.get(first, 0.0) - values.get(held, 0.0),
            cached_tokens=self.session.tokens,
            held_wait_ms=by_id[held].expected_wait_ms,
            fresh_wait_ms=by_id[first].expected_wait_ms,
        )
        if not keep:
            return fresh, self._view(AffinityOutcome.SWITCHED, reason)
        try:
            kept = make(sticky_policy(self.policy, category, held))
        except CoeError as error:
            return fresh, self._view(AffinityOutcome.UNABLE, error.message)
        if kept.stages[0].expert != held:
            return fresh, self._view(AffinityOutcome.UNABLE, "; ".join(kept.notes))
        return kept, self._view(AffinityOutcome.KEPT, reason)

    def _explored(
        self,
        make: Callable[[Policy], Plan],
        category: str,
        candidates: Sequence[Candidate],
        draw: Callable[[Sequence[str]], str | None],
    ) -> tuple[Plan, AffinityView] | None:
        """None when whoever was drawn does not come first within the caps."""
        drawn = draw([candidate.spec.id for candidate in candidates if candidate.available])
        if drawn is None:
            return None
        try:
            plan = make(sticky_policy(self.policy, category, drawn))
        except CoeError:
            return None
        if plan.stages[0].expert != drawn:  # a fallback took its place
            return None
        source = self.conversation.source if self.conversation else ""
        reason = "explored: drawn by what feedback says"
        return plan, AffinityView(AffinityOutcome.NEW, source, drawn, reason)

    def _view(self, outcome: AffinityOutcome, reason: str) -> AffinityView:
        assert self.conversation is not None
        assert self.session is not None
        return AffinityView(outcome, self.conversation.source, self.session.expert, reason)


class Steering:
    """Owns no state: ``sessions`` and ``posteriors`` (category -> expert -> Beta) are others'."""

    def __init__(
        self,
        sessions: Sessions | None = None,
        posteriors: Callable[[str], Mapping[str, Beta]] = lambda _category: {},
        dice: random.Random | None = None,
    ) -> None:
        self._sessions = NoSessions() if sessions is None else sessions
        self._posteriors = posteriors
        self._dice = dice or random.Random()

    async def begin(self, request: WireRequest, journal: Journal, policy: Policy) -> Course:
        """For a request that named no expert. Asks the store only if it continues something."""
        if request.endpoint is Endpoint.EMBEDDINGS:
            # Vectors of two experts cannot be compared, so nobody is tried out of curiosity.
            return Course(policy, off=True)
        if policy.affinity.mode == "off" or len(policy.named_experts) < 2:
            return Course(policy, off=True, explores=self._explores(policy))
        access = journal.access
        owner = access.key.id if access.key is not None else ""
        conversation = conversation_of(request, journal.client_session, owner)
        journal.conversation = conversation
        session = None
        if conversation is not None and conversation.continues:
            session = await self._sessions.recall(conversation.key)
        explores = session is None and self._explores(policy)
        return Course(policy, conversation, session, explores=explores)

    def draw(self, category: str) -> Callable[[Sequence[str]], str | None]:
        return lambda experts: draw_expert(experts, self._posteriors(category), self._dice)

    def _explores(self, policy: Policy) -> bool:
        return policy.explore_share > 0 and self._dice.random() < policy.explore_share
