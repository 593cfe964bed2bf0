"""From a category and live experts to a plan whose caps hold by construction. Pure.

Experts are taken in the route's order, never reordered: the file says which is cheapest. Each is
taken if, after those taken before it, the stage count, the summed worst-case cost and the summed
expected wait stay within the caps; otherwise it is left out with a note. Lowering the money cap
never makes a plan dearer: at the first expert where two caps decide differently, the higher cap
pays for it while the lower one does not reach that sum. (A shorter deadline can: it may rule out a
cheap expert that is slow to become resident.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from experts.errors import (
    BudgetExceeded,
    CoeError,
    DeadlineUnreachable,
    HostUnavailable,
    NoEligibleExpert,
)
from experts.types import Capability, ExpertSpec
from policies.draft_chains import Option, Threshold
from policies.money import worst_case
from policies.objective import Limits, choose, expert_terms
from policies.types import (
    AcceptanceRule,
    Candidate,
    Caps,
    ExpertTerms,
    Overrides,
    PerQuery,
    Plan,
    Policy,
    Stage,
)

_NOT_A_CANDIDATE = "cannot serve this request or is not permitted"


def make_plan(
    policy: Policy,
    category: str,
    candidates: Sequence[Candidate],
    *,
    prompt_tokens: int,
    max_output_tokens: int,
    overrides: Overrides,
    exclusions: Mapping[str, str] | None = None,
    estimates: Mapping[str, float] | None = None,
) -> Plan:
    """The stages to try for a query of ``category``, within policy and request.

    A per-query policy ranks the experts itself, by ``estimates`` of their quality for this query
    where there are any, else by its tables; its route and fallbacks are what is left if none fits.

    ``candidates`` are the eligible experts; ``exclusions`` says why others are not, for notes and
    errors. Raises NoEligibleExpert, HostUnavailable, DeadlineUnreachable or BudgetExceeded when
    neither route nor fallbacks leave a stage.
    """
    if policy.per_query is not None:
        size = (prompt_tokens, max_output_tokens)
        ranked = _ranked(policy.per_query, category, candidates, *size, estimates)
        return _plan_per_query(policy, category, candidates, *size, overrides, exclusions, ranked)
    walk = _Walk(
        policy,
        effective_caps(policy, overrides),
        prompt_tokens,
        max_output_tokens,
        exclusions or {},
    )
    by_id = {candidate.spec.id: candidate for candidate in candidates}
    route = policy.routes.get(category, policy.default).experts
    taken = walk.take(route, by_id)
    if not taken:
        taken = walk.take_first(policy.fallbacks, by_id)
    if not taken:
        names = tuple(dict.fromkeys((*route, *policy.fallbacks)))
        raise walk.refusal(names, by_id)
    on_route = {one.candidate.spec.id for one in taken}
    spare = [n for n in policy.fallbacks if n in by_id and n not in on_route]
    return walk.plan(category, taken, walk.take_alternatives(spare, by_id, behind=taken))


def _ranked(
    rule: PerQuery,
    category: str,
    candidates: Sequence[Candidate],
    prompt_tokens: int,
    max_output_tokens: int,
    estimates: Mapping[str, float] | None,
) -> tuple[ExpertTerms, ...]:
    reachable = [candidate for candidate in candidates if candidate.available]
    return expert_terms(
        rule,
        category,
        reachable,
        prompt_tokens=prompt_tokens,
        output_tokens_max=max_output_tokens,
        estimates=estimates,
    )


def _plan_per_query(
    policy: Policy,
    category: str,
    candidates: Sequence[Candidate],
    prompt_tokens: int,
    max_output_tokens: int,
    overrides: Overrides,
    exclusions: Mapping[str, str] | None,
    terms: tuple[ExpertTerms, ...],
) -> Plan:
    """The chosen expert, or draft and expert, as the route; everybody else by value behind it."""
    rule = policy.per_query
    assert rule is not None
    caps = effective_caps(policy, overrides)
    worst = {c.spec.id: worst_case(c.spec, prompt_tokens, max_output_tokens) for c in candidates}
    limits = Limits(caps.stages, caps.cost_micro_usd, caps.deadline_ms, worst)
    judgeable = {c.spec.id: is_judgeable(policy, c.spec) for c in candidates}
    choice = choose(rule, terms, judgeable, limits)
    route = choice.experts if choice else policy.routes.get(category, policy.default).experts
    spare = tuple(term.expert for term in terms if term.expert not in route)
    fixed = replace(
        policy.with_only_route(route),
        fallbacks=tuple(dict.fromkeys((*spare, *policy.fallbacks))),
    )
    plan = make_plan(
        fixed,
        category,
        candidates,
        prompt_tokens=prompt_tokens,
        max_output_tokens=max_output_tokens,
        overrides=overrides,
        exclusions=exclusions,
    )
    return replace(plan, terms=terms, stages=_with_thresholds(plan.stages, choice))


def _with_thresholds(stages: tuple[Stage, ...], choice: Option | None) -> tuple[Stage, ...]:
    """Each draft under the bound that was found for it instead of the policy's."""
    if choice is None:
        return stages
    found = dict(zip(choice.experts, choice.thresholds, strict=False))
    return tuple(
        stage
        if stage.accept is None or stage.expert not in found
        else replace(stage, accept=_bounded(stage.accept, found[stage.expert]))
        for stage in stages
    )


def _bounded(rule: AcceptanceRule, threshold: Threshold) -> AcceptanceRule:
    return replace(rule, min_confidence=threshold.accept_from, following=threshold.following)


def is_judgeable(policy: Policy, spec: ExpertSpec) -> bool:
    """Whether an answer of this expert can be judged: log-probabilities, and a calibration."""
    return spec.id in policy.calibrations and Capability.LOGPROBS in spec.capabilities


def plan_in_order(
    policy: Policy,
    candidates: Sequence[Candidate],
    *,
    prompt_tokens: int,
    max_output_tokens: int,
    overrides: Overrides,
    category: str = "",
    exclusions: Mapping[str, str] | None = None,
) -> Plan:
    """The plan of directly named experts: the first answers; the next only if it could not.

    Nothing is judged, so the policy's cap on stages, which bounds drafts, does not shorten the
    list; its caps on money and time do. Raises HostUnavailable, DeadlineUnreachable or
    BudgetExceeded when none of them can be asked.
    """
    caps = effective_caps(policy, overrides)
    caps = replace(caps, stages=max(caps.stages, len(candidates)))
    walk = _Walk(policy, caps, prompt_tokens, max_output_tokens, exclusions or {})
    by_id = {candidate.spec.id: candidate for candidate in candidates}
    taken = walk.take_alternatives(by_id, by_id)
    if not taken:
        raise walk.refusal(tuple(by_id), by_id)
    return walk.plan(category, taken[:1], taken[1:])


def effective_caps(policy: Policy, overrides: Overrides) -> Caps:
    """The tighter of policy and request, bound by bound."""
    caps, cost, deadline = policy.caps, overrides.max_cost_micro_usd, overrides.deadline_ms
    return Caps(
        stages=caps.stages,
        cost_micro_usd=caps.cost_micro_usd if cost is None else min(caps.cost_micro_usd, cost),
        deadline_ms=caps.deadline_ms if deadline is None else min(caps.deadline_ms, deadline),
    )


@dataclass(frozen=True, slots=True)
class _Taken:
    candidate: Candidate
    cost_micro_usd: int


class _Walk:
    """One planning run: the bounds, and the notes it collects on its way."""

    def __init__(
        self,
        policy: Policy,
        caps: Caps,
        prompt_tokens: int,
        max_output_tokens: int,
        exclusions: Mapping[str, str],
    ) -> None:
        self._policy = policy
        self._caps = caps
        self._prompt_tokens = prompt_tokens
        self._max_output_tokens = max_output_tokens
        self._exclusions = exclusions
        self._notes: list[str] = []

    def take(self, names: Iterable[str], by_id: Mapping[str, Candidate]) -> list[_Taken]:
        """Every expert of a route that fits behind those already taken."""
        taken: list[_Taken] = []
        for name in names:
            if taken and not self._judgeable(taken[-1].candidate):
                self._notes.append(f"{name}: the answer before it cannot be judged, so it is final")
            elif self._usable(name, by_id):
                taken.extend(self._fit(by_id[name], taken))
        return taken

    def take_first(self, names: Iterable[str], by_id: Mapping[str, Candidate]) -> list[_Taken]:
        """The first fallback that fits, alone: fallbacks are alternatives, not a cascade."""
        for name in names:
            if self._usable(name, by_id) and (fit := self._fit(by_id[name], [])):
                self._notes.append(f"{name}: fallback, the route has nobody left")
                return fit
        return []

    def take_alternatives(
        self, names: Iterable[str], by_id: Mapping[str, Candidate], behind: Sequence[_Taken] = ()
    ) -> list[_Taken]:
        """Every expert that fits as an alternative to the last of ``behind``.

        It runs only if those before it failed, and what fails before its first token costs nothing.
        """
        taken: list[_Taken] = []
        for name in names:
            if self._usable(name, by_id):
                taken.extend(self._fit(by_id[name], [*behind, *taken], free=len(taken) + 1))
        return taken

    def plan(
        self, category: str, taken: Sequence[_Taken], alternatives: Sequence[_Taken] = ()
    ) -> Plan:
        """All of ``taken`` but the last are judged; ``alternatives`` stand in for the last."""
        last = len(taken) - 1
        everyone = (*taken, *alternatives)
        return Plan(
            policy=self._policy.name,
            policy_digest=self._policy.digest,
            category=category,
            stages=tuple(
                Stage(name, self._rule(name, category) if index < last else None)
                for index, name in enumerate(one.candidate.spec.id for one in everyone)
            ),
            caps=self._caps,
            window=self._policy.window,
            stage_costs_micro_usd=tuple(one.cost_micro_usd for one in everyone),
            notes=tuple(dict.fromkeys(self._notes)),
        )

    def refusal(self, names: Sequence[str], by_id: Mapping[str, Candidate]) -> CoeError:
        """Why nothing could be planned: the obstacle that the caller can do most about."""
        known = [by_id[name] for name in names if name in by_id]
        if not known:
            return NoEligibleExpert(
                {**self._exclusions, **{name: self._why_not(name) for name in names}}
            )
        cheapest = min(self._cost(candidate) for candidate in known)
        if cheapest > self._caps.cost_micro_usd:
            return BudgetExceeded(self._money_scope(), cheapest, self._caps.cost_micro_usd)
        affordable = [c for c in known if self._cost(c) <= self._caps.cost_micro_usd]
        reachable = [c for c in affordable if c.available]
        if not reachable:
            first = affordable[0]
            return HostUnavailable(first.spec.id, first.retry_after_ms, first.why_not)
        soonest = min(reachable, key=lambda candidate: candidate.expected_wait_ms)
        return DeadlineUnreachable(
            soonest.spec.id, soonest.expected_wait_ms, self._caps.deadline_ms
        )

    def _usable(self, name: str, by_id: Mapping[str, Candidate]) -> bool:
        candidate = by_id.get(name)
        if candidate is None:
            self._notes.append(f"{name}: {self._why_not(name)}")
        elif not candidate.available:
            self._notes.append(f"{name}: {candidate.why_not or 'no live host'}")
        return candidate is not None and candidate.available

    def _fit(self, candidate: Candidate, before: Sequence[_Taken], free: int = 0) -> list[_Taken]:
        """The expert as a stage behind ``before``; empty, with a note, if a cap forbids it.

        The last ``free`` of ``before`` will have cost nothing if it comes to this stage.
        """
        cost = self._cost(candidate)
        paid = before[: max(0, len(before) - free)]
        obstacle = next(self._obstacles(candidate, cost, before, paid), None)
        if obstacle is None:
            return [_Taken(candidate, cost)]
        self._notes.append(f"{candidate.spec.id}: {obstacle}")
        return []

    def _obstacles(
        self, candidate: Candidate, cost: int, before: Sequence[_Taken], paid: Sequence[_Taken]
    ) -> Iterator[str]:
        caps = self._caps
        total = cost + sum(one.cost_micro_usd for one in paid)
        wait = candidate.expected_wait_ms
        wait += sum(one.candidate.expected_wait_ms for one in before)
        if len(before) >= caps.stages:
            yield f"the cap of {caps.stages} stages is reached"
        if total > caps.cost_micro_usd:
            yield f"worst case {total} micro-USD exceeds the cap of {caps.cost_micro_usd}"
        if wait >= caps.deadline_ms:
            yield f"would start after {wait:.0f} ms of {caps.deadline_ms:.0f} ms"

    def _judgeable(self, candidate: Candidate) -> bool:
        return is_judgeable(self._policy, candidate.spec)

    def _rule(self, name: str, category: str) -> AcceptanceRule:
        calibration = self._policy.calibrations[name].for_category(category)
        return AcceptanceRule(self._policy.min_confidence, calibration)

    def _cost(self, candidate: Candidate) -> int:
        return worst_case(candidate.spec, self._prompt_tokens, self._max_output_tokens)

    def _why_not(self, name: str) -> str:
        return self._exclusions.get(name, _NOT_A_CANDIDATE)

    def _money_scope(self) -> str:
        return (
            "request" if self._caps.cost_micro_usd < self._policy.caps.cost_micro_usd else "policy"
        )
