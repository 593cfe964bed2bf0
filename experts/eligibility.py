"""Which experts can serve a request at all. Pure; nothing ineligible is ever ranked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from experts.types import Capability, ExpertSpec, Needs

_SPEECH = {
    Capability.PARALLEL_TOOLS: "parallel tool calls",
    Capability.JSON_SCHEMA: "JSON schemas",
    Capability.LOGPROBS: "log-probabilities",
}


def eligible(
    catalogue_specs: Iterable[ExpertSpec], needs: Needs
) -> tuple[tuple[ExpertSpec, ...], dict[str, str]]:
    """Split experts into those kept, in catalogue order, and the excluded with why, in words."""
    kept: list[ExpertSpec] = []
    exclusions: dict[str, str] = {}
    for spec in catalogue_specs:
        reasons = list(_shortcomings(spec, needs))
        if reasons:
            exclusions[spec.id] = ", ".join(reasons)
        else:
            kept.append(spec)
    return tuple(kept), exclusions


def _shortcomings(spec: ExpertSpec, needs: Needs) -> Iterator[str]:
    if needs.allow is not None and spec.id not in needs.allow:
        yield "not on the allow list"
    if spec.id in needs.deny:
        yield "on the deny list"
    if missing := needs.required_tags - spec.tags:
        yield f"lacks the tag {_names(missing)}"
    if lacking := needs.capabilities - spec.capabilities:
        yield f"cannot do {_names(_SPEECH.get(one, one.value) for one in lacking)}"
    if needs.language and spec.languages and needs.language not in spec.languages:
        yield f"does not speak {needs.language!r}"
    needed_tokens = needs.prompt_tokens + needs.output_tokens
    if needed_tokens > spec.context_tokens:
        yield f"its context of {spec.context_tokens} tokens is below the {needed_tokens} needed"


def _names(values: Iterable[str]) -> str:
    return " and ".join(sorted(values))
