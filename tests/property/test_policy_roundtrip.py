from __future__ import annotations

from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.errors import ConfigError
from policies.loader import dump_policy, parse_policy

EXPERTS = ("a", "b", "c")
route = st.lists(st.sampled_from(EXPERTS), min_size=1, unique=True)
text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)


offset, penalty = st.floats(-1000, 1000), st.floats(-1000, 0)
begun = {"slope": st.floats(1e-6, 1000), "intercept": st.floats(-10, 10)}
absent = {
    "quantile_10": st.floats(0, 1000),
    "doubt": penalty,
    "entropy": st.fixed_dictionaries({}, optional={"mean": penalty, "missing": offset}),
    "by_category": st.dictionaries(text, offset, max_size=3),
}
whole = {
    "length": st.fixed_dictionaries({"weight": offset}, optional={"missing": offset}),
    "agreement": st.fixed_dictionaries({"weight": st.floats(0, 1000)}),
    "prefix": st.fixed_dictionaries(begun, optional=absent),
}
calibrations = st.fixed_dictionaries(begun, optional={**absent, **whole})
news = st.fixed_dictionaries(
    {"quality_per_usd": st.floats(0, 1e9), "quality": st.just({"general": {"a": 0.5}})},
    optional={
        "confidence_sd": st.just({"a": 0.25, "b": 0.125}),
        "output_tokens_expected": st.integers(1, 10**6),
    },
)


@st.composite
def policy_files(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "version": 1,
        "description": draw(text),
        "routes": draw(st.dictionaries(text.filter(bool), route, max_size=4)),
        "default": draw(route),
        "fallbacks": draw(st.lists(st.sampled_from(EXPERTS))),
        "required_tags": draw(st.lists(st.sampled_from(["eu", "gdpr"]))),
        "cascade": {
            "min_confidence": draw(st.floats(0, 1)),
            "calibration": {name: draw(calibrations) for name in EXPERTS},
            "stream_window": {
                "tokens": draw(st.integers(1, 4096)),
                "hold_ms": draw(st.floats(0, 60_000)),
            },
        },
        "caps": {
            "stages": draw(st.integers(1, 8)),
            "cost_usd": draw(st.integers(0, 10**12)) / 1e6,
            "deadline_ms": draw(st.floats(0.001, 86_400_000)),
        },
        "max_output_tokens_default": draw(st.integers(1, 10**6)),
        **({"per_query": draw(per_query_sections())} if draw(st.booleans()) else {}),
    }


@st.composite
def per_query_sections(draw: st.DrawFn) -> dict[str, Any]:
    section = draw(news)
    drafts = sorted(section.get("confidence_sd", {}))
    for draft in drafts:
        others = st.sampled_from([name for name in EXPERTS if name != draft])
        row = draw(st.dictionaries(others, st.floats(-1, 1), max_size=2))
        section.setdefault("confidence_moves", {})[draft] = row
    return section


@settings(deadline=None)
@given(policy_files())
def test_dumping_and_loading_gives_an_equal_policy(file: dict[str, Any]) -> None:
    source = yaml.safe_dump(file, allow_unicode=True)
    policy = parse_policy(source, name="p", file="p.yaml", catalogue_ids=EXPERTS)
    again = parse_policy(dump_policy(policy), name="p", file="p.yaml", catalogue_ids=EXPERTS)
    assert again == policy
    assert policy.caps.cost_micro_usd == round(file["caps"]["cost_usd"] * 1e6)


def line_at_fault(source: str) -> int | None:
    try:
        parse_policy(source, name="p", file="p.yaml", catalogue_ids=EXPERTS)
    except ConfigError as error:
        return error.line
    return None


@settings(deadline=None)
@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda raw: raw.decode("latin-1")))
def test_any_text_loads_or_is_a_config_error_inside_the_file(source: str) -> None:
    line = line_at_fault(source)
    assert line is None or 1 <= line <= len(source.splitlines()) + 2
