"""From a checked request to a plan: eligibility, classification, live state, policy.

``POST /v1/route`` and the serving endpoints run this very code; explaining only leaves out the
call of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import msgspec
from msgspec import structs

from experts.catalogue import Catalogue
from experts.eligibility import eligible
from experts.errors import (
    CoeError,
    InvalidRequest,
    NoEligibleExpert,
    PromptTooLong,
    ScopeDenied,
    StateUnavailable,
    UnknownModel,
)
from experts.types import Endpoint, ExpertSpec, Needs
from gateway.affinity import conversation_of
from gateway.journal import Decision, Journal
from gateway.keys import Access, KeyScope
from gateway.language import LanguageOf
from gateway.steering import Course, Steering
from gateway.tokens import PromptCounter
from gateway.wire import WireRequest
from policies.live import PolicySet
from policies.plan import make_plan, plan_in_order
from policies.types import Candidate, Plan, Policy
from routers.types import GENERAL, Classification, QueryRouter

__all__ = ["Decider", "LiveState", "Target"]

AUTO = "auto"
POLICY_PREFIX = "coe/"
_ANY = KeyScope()


class LiveState(Protocol):
    """Knows who could answer now, and how long it would take to start."""

    def candidate(self, spec: ExpertSpec) -> Candidate: ...


class Target(msgspec.Struct, frozen=True):
    """What ``model`` names: a policy, and the experts if any were asked for by id, in order."""

    policy: Policy
    experts: tuple[ExpertSpec, ...] = ()

    @property
    def expert(self) -> ExpertSpec | None:
        """The expert that was asked for first."""
        return self.experts[0] if self.experts else None


class Decider:
    """Decides. Holds no state of its own; ``policies`` gives the set in force at each call."""

    def __init__(
        self,
        *,
        catalogue: Catalogue,
        policies: Callable[[], PolicySet],
        router: QueryRouter | None,
        live: LiveState,
        now_ms: Callable[[], float],
        prompt_chars_max: int,
        state_available: Callable[[], bool] = lambda: True,
        language_of: LanguageOf | None = None,
        steering: Steering | None = None,
    ) -> None:
        self._steering = steering or Steering()
        self._catalogue = catalogue
        self._policies = policies
        self._router = router
        self._live = live
        self._now_ms = now_ms
        self._prompt_chars_max = prompt_chars_max
        self._state_available = state_available
        self._language_of = language_of
        self._counter = PromptCounter()

    async def decide(self, request: WireRequest, journal: Journal) -> Decision:
        """Choose the plan. ``journal.router_ms`` is set on the way.

        Raises:
            UnknownModel, InvalidRequest, PromptTooLong, NoEligibleExpert, ScopeDenied,
            StateUnavailable, and what planning raises: HostUnavailable, DeadlineUnreachable,
            BudgetExceeded.
        """
        scope = journal.access.scope
        session = _session(request, journal) if self._policies().canaries else ""
        target = self.target(request, scope, session)
        asked_policy = _asked_policy(request, target)
        _check_access(journal.access, target, asked_policy)
        self._check_state(target.policy)
        self._check_size(request)
        classification = await self._classify(request, target, journal)
        category = classification.category if classification else GENERAL
        course = await self._course(request, journal, target)
        in_play = self._specs_in_play(target, category, course.experts)
        specs, denied = _permitted(in_play, scope)
        output_tokens = _output_tokens(request, target.policy)
        prompt_tokens, longest = await self._count(specs, request, output_tokens)
        needs = self._needs(request, target.policy, specs, longest, output_tokens)
        kept, unfit = eligible(specs, needs)
        if not kept and request.coe.language is None and needs.language is not None:
            # Nobody speaks what was recognised: better an expert that may manage than none.
            needs = structs.replace(needs, language=None)
            kept, unfit = eligible(specs, needs)
        exclusions = unfit | denied
        if not kept:
            raise _nobody(specs, needs, exclusions, request.prompt_field)
        candidates = tuple(self._live.candidate(spec) for spec in kept)
        if prompt_tokens != longest:  # what is paid for is not what must fit at once
            needs = structs.replace(needs, prompt_tokens=prompt_tokens)
        plan, affinity = course.plan(
            lambda policy: _plan(
                request,
                target if policy is target.policy else structs.replace(target, policy=policy),
                category,
                candidates,
                exclusions,
                needs,
                classification.quality if classification else None,
            ),
            category,
            classification.posterior if classification else {category: 1.0},
            candidates,
            self._steering.draw(category),
        )
        by_id = {spec.id: spec for spec in kept}
        return Decision(
            plan=plan,
            experts=tuple(by_id[stage.expert] for stage in plan.stages),
            classification=classification,
            candidates=candidates,
            exclusions=exclusions,
            prompt_tokens=prompt_tokens,
            max_output_tokens=output_tokens,
            asked_policy=asked_policy,
            named_expert=target.expert.id if target.expert is not None else None,
            limits_fail_open=_limits_fail_open(target.policy),
            needs=needs,
            affinity=affinity,
            affinity_ttl_ms=0 if course.off else 1_000 * target.policy.affinity.ttl_s,
        )

    async def _course(self, request: WireRequest, journal: Journal, target: Target) -> Course:
        if target.experts:
            return Course(target.policy, off=True)
        return await self._steering.begin(request, journal, target.policy)

    async def count_tokens(self, request: WireRequest, access: Access) -> int:
        """Prompt tokens by the hungriest tokenizer of all experts that ``model`` may lead to.

        Raises what ``decide`` raises for the model, the key and the prompt's size.
        """
        target = self.target(request, access.scope)
        _check_access(access, target, _asked_policy(request, target))
        self._check_size(request)
        policy = target.policy
        named = policy.named_experts
        specs = target.experts or [self._catalogue.get(name) for name in named]
        return await self._counter.count(
            specs,
            request.texts,
            messages=request.message_count,
            ids=request.prompt_ids,
            output_tokens=0,
            exact=True,
        )

    def off_route(self, decision: Decision) -> dict[str, str]:
        """Why each expert was left out that the decision did not even look at; for explaining."""
        seen = {candidate.spec.id for candidate in decision.candidates} | set(decision.exclusions)
        plan = decision.plan
        reason = (
            "not among the experts that the request names"
            if decision.named_expert is not None
            else f"policy {plan.policy!r} names it neither for {plan.category!r} nor as a fallback"
        )
        return {name: reason for name in self._catalogue.ids if name not in seen}

    async def _count(
        self, specs: Sequence[ExpertSpec], request: WireRequest, output_tokens: int
    ) -> tuple[int, int]:
        """Prompt tokens to be paid for, and those that must fit into a context at once."""
        several = len(request.texts) > 1 or request.prompt_ids > request.prompt_ids_max
        if request.endpoint is Endpoint.EMBEDDINGS or (
            request.endpoint is Endpoint.COMPLETIONS and several
        ):
            tokens, longest = await self._counter.count_each(specs, request.texts)
            return tokens + request.prompt_ids, longest + request.prompt_ids_max
        tokens = await self._counter.count(
            specs,
            request.texts,
            messages=request.message_count,
            ids=request.prompt_ids,
            output_tokens=output_tokens,
        )
        return tokens, tokens

    def _needs(
        self,
        request: WireRequest,
        policy: Policy,
        specs: Sequence[ExpertSpec],
        prompt_tokens: int,
        output_tokens: int,
    ) -> Needs:
        coe = request.coe
        language = coe.language
        if language is None and self._language_of and any(spec.languages for spec in specs):
            language = self._language_of(request.routing_text)
        return Needs(
            capabilities=request.capabilities,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            required_tags=policy.required_tags | coe.tags,
            language=language,
            allow=coe.allow,
            deny=coe.deny,
        )

    def _check_state(self, policy: Policy) -> None:
        """Last known hosts are good enough, unless the policy says otherwise."""
        if policy.on_state_outage.get("routing") == "closed" and not self._state_available():
            raise StateUnavailable("routing")

    def check_listing(self, access: Access) -> None:
        """Whether the model list may be shown; the default policy speaks for it in an outage."""
        if access.unverified and not _limits_fail_open(self._policies().default_policy):
            raise StateUnavailable("keys")

    def target(self, request: WireRequest, scope: KeyScope = _ANY, session: str = "") -> Target:
        """Resolve ``model`` and ``coe.policy``. Raises UnknownModel or InvalidRequest.

        ``scope`` bounds what the error names, nothing else. ``session`` decides which version of a
        policy with a canary is meant.
        """
        policies, asked = self._policies(), request.coe.policy
        if asked is not None and asked not in policies:
            known = ", ".join(policies.names)
            raise InvalidRequest("coe.policy", f"no policy {asked!r}; known are {known}")
        override = policies.choose(asked, session) if asked is not None else None
        model = request.model
        if model in self._catalogue:
            named = self._named((model, *request.models), scope)
            return Target(override or policies.default_policy, named)
        name = policies.default if model == AUTO else model.removeprefix(POLICY_PREFIX)
        if (model == AUTO or model.startswith(POLICY_PREFIX)) and name in policies:
            return Target(
                override or policies.choose(name, session), self._named(request.models, scope)
            )
        raise UnknownModel(model, self.model_names(scope))

    def _named(self, names: Iterable[str], scope: KeyScope) -> tuple[ExpertSpec, ...]:
        """Experts by id, each once. Raises UnknownModel: a list holds experts, no policies."""
        for name in names:
            if name not in self._catalogue:
                raise UnknownModel(name, tuple(filter(scope.allows_naming, self._catalogue.ids)))
        return tuple(self._catalogue.get(name) for name in dict.fromkeys(names))

    def model_names(self, scope: KeyScope = _ANY) -> tuple[str, ...]:
        """Everything ``model`` may say within ``scope``: auto, the policies, the experts."""
        policies = self._policies()
        auto = (AUTO,) if scope.allows_policy(policies.default) else ()
        named = (f"{POLICY_PREFIX}{name}" for name in policies.names if scope.allows_policy(name))
        return (*auto, *named, *filter(scope.allows_naming, self._catalogue.ids))

    def _check_size(self, request: WireRequest) -> None:
        if (chars := request.prompt_chars) > self._prompt_chars_max:
            limit = self._prompt_chars_max
            reason = f"{chars} characters; at most {limit} are accepted"
            raise InvalidRequest(request.prompt_field, reason)

    async def _classify(
        self, request: WireRequest, target: Target, journal: Journal
    ) -> Classification | None:
        """None where the category cannot change anything: a named expert, or a policy of one route.

        A prompt without words (images only) goes to the general category as well.
        """
        if self._router is None or target.expert is not None or not request.routing_text.strip():
            return None
        started_ms = self._now_ms()
        classification = await self._router.classify(request.routing_text)
        journal.router_ms = self._now_ms() - started_ms
        return classification

    def _specs_in_play(
        self, target: Target, category: str, more: Sequence[str]
    ) -> Sequence[ExpertSpec]:
        """The experts this plan could name. With hundreds of experts, no other is looked at."""
        if target.experts:
            return target.experts
        policy = target.policy
        route = policy.routes.get(category, policy.default).experts
        if policy.per_query is not None:
            route = policy.named_experts
        return [self._catalogue.get(n) for n in dict.fromkeys((*route, *policy.fallbacks, *more))]


def _session(request: WireRequest, journal: Journal) -> str:
    """What a canary is drawn by: the conversation, so that it keeps its version, or the request."""
    key = journal.access.key
    conversation = conversation_of(request, journal.client_session, key.id if key else "")
    return conversation.key if conversation is not None else journal.decision_id


def _asked_policy(request: WireRequest, target: Target) -> str | None:
    """The policy the caller chose; None when an expert was named and the default's caps hold."""
    return request.coe.policy if target.expert is not None else target.policy.name


def _limits_fail_open(policy: Policy) -> bool:
    return policy.on_state_outage.get("budgets") == "open"


def _check_access(access: Access, target: Target, asked_policy: str | None) -> None:
    """Raises StateUnavailable for a key that cannot be looked up, and ScopeDenied."""
    if access.unverified and not _limits_fail_open(target.policy):
        raise StateUnavailable("keys")
    scope = access.scope
    if asked_policy is not None and not scope.allows_policy(asked_policy):
        raise ScopeDenied("policy", asked_policy)
    if target.experts and not any(scope.allows_naming(spec.id) for spec in target.experts):
        raise ScopeDenied("expert", target.experts[0].id)


def _permitted(
    specs: Sequence[ExpertSpec], scope: KeyScope
) -> tuple[Sequence[ExpertSpec], dict[str, str]]:
    """The experts a key may use, and why not the others. Raises ScopeDenied if none is left."""
    kept = [spec for spec in specs if scope.allows_expert(spec.id)]
    if not kept:
        raise ScopeDenied("expert", specs[0].id)
    denied = [spec.id for spec in specs if not scope.allows_expert(spec.id)]
    return kept, dict.fromkeys(denied, "outside the API key's scope")


def _output_tokens(request: WireRequest, policy: Policy) -> int:
    if request.endpoint is Endpoint.EMBEDDINGS:
        return 0
    return request.max_output_tokens or policy.max_output_tokens_default


def _nobody(
    specs: Iterable[ExpertSpec], needs: Needs, exclusions: Mapping[str, str], field_name: str
) -> CoeError:
    """PromptTooLong when only the context stands in the way, else NoEligibleExpert."""
    shorter = structs.replace(needs, prompt_tokens=0, output_tokens=0)
    fitting, _ = eligible(specs, shorter)
    if not fitting:
        return NoEligibleExpert(dict(exclusions))
    limit = max(spec.context_tokens for spec in fitting)
    return PromptTooLong(needs.prompt_tokens + needs.output_tokens, limit, field_name)


def _plan(
    request: WireRequest,
    target: Target,
    category: str,
    candidates: Sequence[Candidate],
    exclusions: Mapping[str, str],
    needs: Needs,
    estimates: Mapping[str, float] | None,
) -> Plan:
    output_tokens = needs.output_tokens * request.choices
    if target.experts:
        return plan_in_order(
            target.policy,
            candidates,
            prompt_tokens=needs.prompt_tokens,
            max_output_tokens=output_tokens,
            overrides=request.coe.overrides,
            category=category,
            exclusions=exclusions,
        )
    plan = make_plan(
        target.policy,
        category,
        candidates,
        prompt_tokens=needs.prompt_tokens,
        max_output_tokens=output_tokens,
        overrides=request.coe.overrides,
        exclusions=exclusions,
        estimates=estimates,
    )
    if request.endpoint is Endpoint.EMBEDDINGS:  # a vector holds no evidence to judge it by
        return replace(plan, stages=tuple(replace(one, accept=None) for one in plan.stages))
    return plan
