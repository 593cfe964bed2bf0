"""From a checked request to a plan: eligibility, classification, live state, policy.

``POST /v1/route`` and the serving endpoints run this very code; explaining only leaves out the
call of an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

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
from experts.types import ExpertSpec, Needs
from gateway.journal import Decision, Journal
from gateway.keys import Access, KeyScope
from gateway.tokens import PromptCounter
from gateway.wire import WireRequest
from policies.live import PolicySet
from policies.plan import make_plan, plan_single
from policies.types import Candidate, Plan, Policy
from routers.types import GENERAL, Classification, QueryRouter

__all__ = ["Decider", "LiveState", "Target"]

AUTO = "auto"
POLICY_PREFIX = "coe/"
_ANY = KeyScope()


class LiveState(Protocol):
    """Knows who could answer now, and how long it would take to start."""

    def candidate(self, spec: ExpertSpec) -> Candidate: ...


@dataclass(frozen=True, slots=True)
class Target:
    """What ``model`` names: a policy, and the expert if one was asked for by id."""

    policy: Policy
    expert: ExpertSpec | None


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
    ) -> None:
        self._catalogue = catalogue
        self._policies = policies
        self._router = router
        self._live = live
        self._now_ms = now_ms
        self._prompt_chars_max = prompt_chars_max
        self._state_available = state_available
        self._counter = PromptCounter(catalogue.specs)

    async def decide(self, request: WireRequest, journal: Journal) -> Decision:
        """Choose the plan. ``journal.router_ms`` is set on the way.

        Raises:
            UnknownModel, InvalidRequest, PromptTooLong, NoEligibleExpert, ScopeDenied,
            StateUnavailable, and what planning raises: HostUnavailable, DeadlineUnreachable,
            BudgetExceeded.
        """
        scope = journal.access.scope
        target = self.target(request, scope)
        asked_policy = _asked_policy(request, target)
        _check_access(journal.access, target, asked_policy)
        self._check_state(target.policy)
        self._check_size(request)
        classification = await self._classify(request, target, journal)
        category = classification.category if classification else GENERAL
        specs, denied = _permitted(self._specs_in_play(target, category), scope)
        output_tokens = request.max_output_tokens or target.policy.max_output_tokens_default
        prompt_tokens = await self._counter.count(
            specs,
            request.texts,
            messages=request.message_count,
            ids=request.prompt_ids,
            output_tokens=output_tokens,
        )
        needs = _needs(request, prompt_tokens, output_tokens)
        kept, unfit = eligible(specs, needs)
        exclusions = unfit | denied
        if not kept:
            raise _nobody(specs, needs, exclusions)
        candidates = tuple(self._live.candidate(spec) for spec in kept)
        plan = _plan(request, target, category, candidates, exclusions, needs)
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
        )

    def _check_state(self, policy: Policy) -> None:
        """Last known hosts are good enough, unless the policy says otherwise."""
        if policy.on_state_outage.get("routing") == "closed" and not self._state_available():
            raise StateUnavailable("routing")

    def check_listing(self, access: Access) -> None:
        """Whether the model list may be shown; the default policy speaks for it in an outage."""
        if access.unverified and not _limits_fail_open(self._policies().default_policy):
            raise StateUnavailable("keys")

    def target(self, request: WireRequest, scope: KeyScope = _ANY) -> Target:
        """Resolve ``model`` and ``coe.policy``. Raises UnknownModel or InvalidRequest.

        ``scope`` bounds what the error names, nothing else.
        """
        policies, asked = self._policies(), request.coe.policy
        if asked is not None and asked not in policies:
            known = ", ".join(policies.names)
            raise InvalidRequest("coe.policy", f"no policy {asked!r}; known are {known}")
        override = policies.get(asked) if asked is not None else None
        model = request.model
        if model in self._catalogue:
            return Target(override or policies.default_policy, self._catalogue.get(model))
        name = policies.default if model == AUTO else model.removeprefix(POLICY_PREFIX)
        if (model == AUTO or model.startswith(POLICY_PREFIX)) and name in policies:
            return Target(override or policies.get(name), None)
        raise UnknownModel(model, self.model_names(scope))

    def model_names(self, scope: KeyScope = _ANY) -> tuple[str, ...]:
        """Everything ``model`` may say within ``scope``: auto, the policies, the experts."""
        policies = self._policies()
        auto = (AUTO,) if scope.allows_policy(policies.default) else ()
        named = (f"{POLICY_PREFIX}{name}" for name in policies.names if scope.allows_policy(name))
        return (*auto, *named, *filter(scope.allows_naming, self._catalogue.ids))

    def _check_size(self, request: WireRequest) -> None:
        if (chars := request.prompt_chars) > self._prompt_chars_max:
            field_name = "messages" if request.message_count else "prompt"
            limit = self._prompt_chars_max
            raise InvalidRequest(field_name, f"{chars} characters; at most {limit} are accepted")

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

    def _specs_in_play(self, target: Target, category: str) -> Sequence[ExpertSpec]:
        """The experts this plan could name. With hundreds of experts, no other is looked at."""
        if target.expert is not None:
            return (target.expert,)
        policy = target.policy
        route = policy.routes.get(category, policy.default).experts
        return [self._catalogue.get(n) for n in dict.fromkeys((*route, *policy.fallbacks))]


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
    if target.expert is not None and not scope.allows_naming(target.expert.id):
        raise ScopeDenied("expert", target.expert.id)


def _permitted(
    specs: Sequence[ExpertSpec], scope: KeyScope
) -> tuple[Sequence[ExpertSpec], dict[str, str]]:
    """The experts a key may use, and why not the others. Raises ScopeDenied if none is left."""
    kept = [spec for spec in specs if scope.allows_expert(spec.id)]
    if not kept:
        raise ScopeDenied("expert", specs[0].id)
    denied = [spec.id for spec in specs if not scope.allows_expert(spec.id)]
    return kept, dict.fromkeys(denied, "outside the API key's scope")


def _needs(request: WireRequest, prompt_tokens: int, output_tokens: int) -> Needs:
    return Needs(
        capabilities=request.capabilities,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        allow=request.coe.allow,
        deny=request.coe.deny,
    )


def _nobody(specs: Iterable[ExpertSpec], needs: Needs, exclusions: Mapping[str, str]) -> CoeError:
    """PromptTooLong when only the context stands in the way, else NoEligibleExpert."""
    shorter = Needs(needs.capabilities, 0, 0, needs.required_tags, needs.allow, needs.deny)
    fitting, _ = eligible(specs, shorter)
    if not fitting:
        return NoEligibleExpert(dict(exclusions))
    limit = max(spec.context_tokens for spec in fitting)
    return PromptTooLong(needs.prompt_tokens + needs.output_tokens, limit)


def _plan(
    request: WireRequest,
    target: Target,
    category: str,
    candidates: Sequence[Candidate],
    exclusions: Mapping[str, str],
    needs: Needs,
) -> Plan:
    output_tokens = needs.output_tokens * request.choices
    if target.expert is not None:
        return plan_single(
            target.policy,
            candidates[0],
            prompt_tokens=needs.prompt_tokens,
            max_output_tokens=output_tokens,
            overrides=request.coe.overrides,
            category=category,
        )
    return make_plan(
        target.policy,
        category,
        candidates,
        prompt_tokens=needs.prompt_tokens,
        max_output_tokens=output_tokens,
        overrides=request.coe.overrides,
        exclusions=exclusions,
    )
