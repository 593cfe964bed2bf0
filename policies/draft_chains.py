"""What drafts before an expert are worth, and from which confidence on each is accepted. Pure.

Cascade routing (Dekoninck et al., 2410.10347, section 3) in closed form, for plans that are fixed
before the first call. A draft d tells its news e ~ N(0, 1): the estimate of its own quality moves
to q_d + s_dd e, and since errors of experts go together, that of expert m moves by s_dm e. What may
follow (an expert, or drafts and an expert) is worth V + s_dV e to first order, where s_dV weighs
the experts in it by the probability that each answers. So a draft is worth the expected maximum of
two correlated normal variables (Clark, "The greatest of a finite set of random variables", 1961)
less its own price, and its answer is accepted where the first line lies above the second:

    c >= q_d + s_dd · (V - q_d) / (s_dd - s_dV)

A draft whose news moves what follows as much as itself (s_dV >= s_dd) never pays: however good or
bad its answer looks, the comparison comes out as before. Where a second draft f runs behind d,
d's confidence moves the estimates that f's bound is made of, and so the bound itself.

Chains grow from their end: drafts are put before the ``_KEPT`` options of the highest value, again
and again until the cap on stages, which is all of them with three experts. Requests wait for this,
so a chain is only built once its value is known to be among the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from policies.types import ExpertTerms, Following, PerQuery

__all__ = ["Option", "Threshold", "options", "single"]

_KEPT = 8
_SPREAD_MIN = 1e-9
_HALF_ROOT = math.sqrt(0.5)
_DENSITY = 1.0 / math.sqrt(2.0 * math.pi)


@dataclass(frozen=True, slots=True)
class Threshold:
    """Accept a draft from this confidence on. ``following``: how the answer before it moves it."""

    accept_from: float
    following: Following | None = None


@dataclass(frozen=True, slots=True)
class Option:
    """Experts to run in order; all but the last are drafts, with a threshold each.

    ``value`` counts quality less prices; ``quality`` and ``cost_micro_usd`` are what is expected of
    it all. ``answers``: the probability that each expert's answer is the one served. ``rest`` is
    the option that follows the first draft.
    """

    experts: tuple[str, ...]
    terms: tuple[ExpertTerms, ...]
    thresholds: tuple[Threshold, ...]
    value: float
    quality: float
    cost_micro_usd: float
    answers: tuple[float, ...]
    rest: Option | None = None

    def moved_by(self, draft: str, rule: PerQuery) -> float:
        """By how much one standard deviation of the draft's news moves this option's value."""
        row = rule.confidence_moves.get(draft)
        if not row:
            return 0.0
        return sum(
            share * row.get(expert, 0.0)
            for expert, share in zip(self.experts, self.answers, strict=True)
        )


@dataclass(frozen=True, slots=True)
class _Drafted:
    """A draft before an option, valued but not yet built."""

    draft: ExpertTerms
    option: Option
    spread: float
    relative: float  # standard deviation of the difference between the two lines
    kept: float  # probability that the draft's answer is accepted
    gain: float  # what the spread of the better of both adds to the means
    value: float


def options(
    rule: PerQuery,
    terms: Sequence[ExpertTerms],
    judgeable: Mapping[str, bool],
    fits: Callable[[Sequence[ExpertTerms]], bool],
    *,
    stages_max: int,
) -> Iterator[Option]:
    """Every single expert that fits, and for every length the chains of the highest value.

    ``judgeable``: whose answers come with log-probabilities and a calibration. ``fits`` says of
    experts in order whether the caps allow them together; what it refuses fits in no longer chain.
    """
    drafts = [
        term
        for term in terms
        if rule.moves(term.expert, term.expert) > 0.0 and judgeable.get(term.expert, False)
    ]
    depth = [single(term) for term in terms if fits((term,))]
    yield from depth
    for _ in range(stages_max - 1):
        best = sorted(depth, key=lambda option: -option.value)[:_KEPT]
        valued = sorted(_drafted(rule, drafts, best), key=lambda one: -one.value)
        fitting = (one for one in valued if fits((one.draft, *one.option.terms)))
        depth = [_built(rule, one) for one in islice(fitting, _KEPT)]
        yield from depth


def single(term: ExpertTerms) -> Option:
    """One expert whose answer is taken as it is."""
    cost = float(term.cost_micro_usd)
    return Option((term.expert,), (term,), (), term.value, term.quality, cost, (1.0,))


def _drafted(
    rule: PerQuery, drafts: Sequence[ExpertTerms], following: Sequence[Option]
) -> Iterator[_Drafted]:
    for draft in drafts:
        spread = rule.confidence_sd[draft.expert]
        price = draft.money_term + draft.latency_term
        for option in following:
            if draft.expert in option.experts:
                continue
            relative = spread - option.moved_by(draft.expert, rule)
            if relative > _SPREAD_MIN:
                gap = (draft.quality - option.value) / relative
                kept = 0.5 * math.erfc(-gap * _HALF_ROOT)
                gain = relative * math.exp(-gap * gap / 2.0) * _DENSITY
                value = draft.quality * kept + option.value * (1.0 - kept) + gain - price
                yield _Drafted(draft, option, spread, relative, kept, gain, value)


def _built(rule: PerQuery, one: _Drafted) -> Option:
    """``quality`` gains what the value gains: it lies in which answer is served."""
    draft, option, kept = one.draft, one.option, one.kept
    bound = draft.quality + one.spread * (option.value - draft.quality) / one.relative
    return Option(
        experts=(draft.expert, *option.experts),
        terms=(draft, *option.terms),
        thresholds=(Threshold(_unit(bound)), *_led(rule, draft, option)),
        value=one.value,
        quality=draft.quality * kept + option.quality * (1.0 - kept) + one.gain,
        cost_micro_usd=draft.cost_micro_usd + (1.0 - kept) * option.cost_micro_usd,
        answers=(kept, *((1.0 - kept) * share for share in option.answers)),
        rest=option,
    )


def _led(rule: PerQuery, draft: ExpertTerms, option: Option) -> tuple[Threshold, ...]:
    """The option's thresholds, the first of which now moves with the new draft's confidence."""
    if not option.thresholds:
        return ()
    first, *others = option.thresholds
    second, rest = option.experts[0], option.rest
    assert rest is not None
    own = rule.moves(second, second)
    relative = own - rest.moved_by(second, rule)
    per_news = 1.0 / rule.moves(draft.expert, draft.expert)
    on_second = rule.moves(draft.expert, second) * per_news
    on_rest = rest.moved_by(draft.expert, rule) * per_news
    moved = on_second + own / relative * (on_rest - on_second)
    following = Following(moved, draft.quality) if moved else None
    return (Threshold(first.accept_from, following), *others)


def _unit(confidence: float) -> float:
    return min(1.0, max(0.0, confidence))
