"""Policy files to policies and back."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from experts.catalogue import ID_PATTERN
from experts.errors import ConfigError
from experts.quantities import micro_usd
from experts.strict_yaml import Document, first_of, parse_document, read_bounded
from experts.types import MICRO_USD_PER_USD
from experts.yaml_tree import Loc
from policies.calibration import EntropyWeights, OneWeight
from policies.schema import CalibrationSection, PolicyFile, PrefixCalibrationSection
from policies.types import Affinity, Calibration, Caps, PerQuery, Policy, Route, StreamWindow

_DIGEST_HEX_DIGITS = 16
_NOT_IN_DIGEST = {"description"}


def load_policy(path: Path, catalogue_ids: Collection[str] | None) -> Policy:
    """Load and check one policy file; its stem is the policy's name.

    ``catalogue_ids`` None skips the check that the experts exist. Raises ConfigError.
    """
    if not re.fullmatch(ID_PATTERN, path.stem):
        raise ConfigError(
            str(path), None, "", f"a policy's file name must match {ID_PATTERN} before .yaml"
        )
    return parse_policy(
        read_bounded(path), name=path.stem, file=str(path), catalogue_ids=catalogue_ids
    )


def parse_policy(
    text: str, *, name: str, file: str, catalogue_ids: Collection[str] | None
) -> Policy:
    """As ``load_policy``, from text; ``file`` is what errors name. Raises ConfigError."""
    document = parse_document(text, PolicyFile, file=file)
    problems = list(_problems(document, catalogue_ids))
    if problems:
        raise first_of(problems)
    return _build(document.value, name)


def dump_policy(policy: Policy) -> str:
    """The policy as canonical YAML: loading it under the same name gives an equal policy."""
    return yaml.safe_dump(_canonical(policy), sort_keys=False, allow_unicode=True, width=100)


def policy_json_schema() -> dict[str, Any]:
    """JSON Schema of a policy file, for editors."""
    schema = PolicyFile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "Policy"}


# --- checks that span several keys ---------------------------------------------------------------


def _problems(
    document: Document[PolicyFile], catalogue_ids: Collection[str] | None
) -> Iterator[ConfigError]:
    file = document.value
    if catalogue_ids is not None:
        for loc, expert in _named_experts(file):
            if expert not in catalogue_ids:
                yield document.unknown(loc, expert, catalogue_ids, "expert")
    if file.per_query is not None and not file.per_query.quality.get("general"):
        yield document.error(
            ("per_query", "quality"), "add a row 'general': it serves categories without one"
        )
    yield from _move_problems(document)
    for loc, expert in _judged_experts(file):
        if expert not in file.cascade.calibration:
            yield document.error(
                loc,
                f"{expert!r} is followed by another expert, so its answers are judged; add "
                f"cascade.calibration.{expert}: {{slope: …, intercept: …}}",
            )


def _move_problems(document: Document[PolicyFile]) -> Iterator[ConfigError]:
    rule = document.value.per_query
    for draft, row in rule.confidence_moves.items() if rule is not None else ():
        loc = ("per_query", "confidence_moves", draft)
        if rule is not None and draft not in rule.confidence_sd:
            yield document.error(loc, f"{draft!r} never drafts; add confidence_sd.{draft}")
        if draft in row:
            yield document.error((*loc, draft), "how it moves its own estimate is confidence_sd")


def _routes(file: PolicyFile) -> Iterator[tuple[Loc, tuple[str, ...]]]:
    for category, experts in file.routes.items():
        yield ("routes", category), experts
    yield ("default",), file.default


def _named_experts(file: PolicyFile) -> Iterator[tuple[Loc, str]]:
    for loc, experts in _routes(file):
        yield from (((*loc, index), expert) for index, expert in enumerate(experts))
    yield from ((("fallbacks", index), expert) for index, expert in enumerate(file.fallbacks))
    yield from ((("cascade", "calibration", expert), expert) for expert in file.cascade.calibration)
    if file.per_query is not None:
        for category, row in file.per_query.quality.items():
            yield from ((("per_query", "quality", category, expert), expert) for expert in row)
        yield from (
            (("per_query", "confidence_sd", expert), expert)
            for expert in file.per_query.confidence_sd
        )
        for draft, row in file.per_query.confidence_moves.items():
            yield ("per_query", "confidence_moves", draft), draft
            yield from ((("per_query", "confidence_moves", draft, e), e) for e in row)


def _judged_experts(file: PolicyFile) -> Iterator[tuple[Loc, str]]:
    """Every expert of a route but the last."""
    for loc, experts in _routes(file):
        yield from (((*loc, index), expert) for index, expert in enumerate(experts[:-1]))
    if file.per_query is not None:
        for expert in file.per_query.confidence_sd:
            yield ("per_query", "confidence_sd", expert), expert


# --- building and dumping ------------------------------------------------------------------------


def _build(file: PolicyFile, name: str) -> Policy:
    cascade, caps = file.cascade, file.caps
    undigested = Policy(
        name=name,
        digest="",
        routes={category: Route(experts) for category, experts in file.routes.items()},
        default=Route(file.default),
        fallbacks=file.fallbacks,
        min_confidence=cascade.min_confidence,
        calibrations={
            expert: _built_calibration(fit) for expert, fit in cascade.calibration.items()
        },
        window=StreamWindow(cascade.stream_window.tokens, cascade.stream_window.hold_ms),
        caps=Caps(caps.stages, micro_usd(caps.cost_usd), caps.deadline_ms),
        max_output_tokens_default=file.max_output_tokens_default,
        on_state_outage=file.on_state_outage.model_dump(),
        required_tags=file.required_tags,
        affinity=Affinity(**file.affinity.model_dump()),
        explore_share=file.explore.share,
        per_query=PerQuery(**file.per_query.model_dump()) if file.per_query else None,
        description=file.description,
    )
    return replace(undigested, digest=_digest(undigested))


def _built_calibration(fit: PrefixCalibrationSection) -> Calibration:
    groups: dict[str, Any] = {}
    if fit.entropy is not None:
        groups["entropy"] = EntropyWeights(**fit.entropy.model_dump())
    if isinstance(fit, CalibrationSection):
        if fit.length is not None:
            groups["length"] = OneWeight(**fit.length.model_dump())
        if fit.agreement is not None:
            groups["agreement"] = OneWeight(**fit.agreement.model_dump())
        if fit.prefix is not None:
            groups["prefix"] = _built_calibration(fit.prefix)
    numbers = fit.model_dump(exclude={"entropy", "length", "agreement", "prefix"})
    return Calibration(**numbers, **groups)


def _digest(policy: Policy) -> str:
    """Over what decides, so neither a comment, the description nor a new file name changes it."""
    decisive = {k: v for k, v in _canonical(policy).items() if k not in _NOT_IN_DIGEST}
    text = json.dumps(decisive, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGEST_HEX_DIGITS]


def _canonical(policy: Policy) -> dict[str, Any]:
    """The file's shape, with every default written out and numbers in one form."""
    return {
        "version": 1,
        "description": policy.description,
        "routes": {name: list(route.experts) for name, route in sorted(policy.routes.items())},
        "default": list(policy.default.experts),
        "fallbacks": list(policy.fallbacks),
        "required_tags": sorted(policy.required_tags),
        "affinity": {
            "mode": policy.affinity.mode,
            "ttl_s": policy.affinity.ttl_s,
            "quality_worth_ms": float(policy.affinity.quality_worth_ms),
            "prefill_ms_per_token": float(policy.affinity.prefill_ms_per_token),
        },
        "explore": {"share": float(policy.explore_share)},
        **({"per_query": _per_query(policy.per_query)} if policy.per_query else {}),
        "cascade": {
            "min_confidence": float(policy.min_confidence),
            "calibration": {
                expert: _calibration(fit) for expert, fit in sorted(policy.calibrations.items())
            },
            "stream_window": {
                "tokens": policy.window.tokens,
                "hold_ms": float(policy.window.hold_ms),
            },
        },
        "caps": {
            "stages": policy.caps.stages,
            "cost_usd": policy.caps.cost_micro_usd / MICRO_USD_PER_USD,
            "deadline_ms": float(policy.caps.deadline_ms),
        },
        "max_output_tokens_default": policy.max_output_tokens_default,
        "on_state_outage": dict(sorted(policy.on_state_outage.items())),
    }


def _calibration(fit: Calibration) -> dict[str, Any]:
    """What is 0 or empty is left out: a file without it has the digest it always had."""
    return _without_nothing(asdict(fit), always=("slope", "intercept"))


def _without_nothing(numbers: Mapping[str, Any], always: Collection[str] = ()) -> dict[str, Any]:
    """Numbers as floats; zeros and what is absent left out, a section that is there kept."""
    kept: dict[str, Any] = {}
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            if name == "by_category":
                value = {key: float(number) for key, number in sorted(value.items())}
                if value:
                    kept[name] = value
            else:
                required = ("slope", "intercept") if name == "prefix" else ("weight",)
                kept[name] = _without_nothing(value, required)
        elif value is not None and (value or name in always):
            kept[name] = float(value)
    return kept


def _per_query(rule: PerQuery) -> dict[str, Any]:
    return {
        "quality_per_usd": float(rule.quality_per_usd),
        "quality_per_s": float(rule.quality_per_s),
        "output_tokens_expected": rule.output_tokens_expected,
        "quality": {
            category: {expert: float(value) for expert, value in sorted(row.items())}
            for category, row in sorted(rule.quality.items())
        },
        "confidence_sd": {
            expert: float(value) for expert, value in sorted(rule.confidence_sd.items())
        },
        **({"confidence_moves": _moves(rule)} if rule.confidence_moves else {}),
    }


def _moves(rule: PerQuery) -> dict[str, dict[str, float]]:
    return {
        draft: {expert: float(value) for expert, value in sorted(row.items())}
        for draft, row in sorted(rule.confidence_moves.items())
    }
