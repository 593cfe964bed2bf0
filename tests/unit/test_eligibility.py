from __future__ import annotations

from experts.eligibility import eligible
from experts.types import Capability, ExpertSpec, Needs, Price, SourceKind

CHAT = frozenset({Capability.CHAT})


def spec(
    name: str,
    context_tokens: int = 100,
    capabilities: frozenset[Capability] = CHAT,
    tags: frozenset[str] = frozenset(),
    languages: frozenset[str] = frozenset(),
) -> ExpertSpec:
    return ExpertSpec(
        name,
        SourceKind.SCRIPTED,
        "echo",
        Price(),
        context_tokens,
        capabilities,
        tags=tags,
        languages=languages,
    )


def kept(specs: list[ExpertSpec], needs: Needs) -> tuple[str, ...]:
    return tuple(one.id for one in eligible(specs, needs)[0])


def test_prompt_and_output_must_fit_the_context_together() -> None:
    specs = [spec("small", 100), spec("large", 101)]
    found, exclusions = eligible(specs, Needs(CHAT, prompt_tokens=60, output_tokens=41))
    assert [one.id for one in found] == ["large"]
    assert exclusions == {"small": "its context of 100 tokens is below the 101 needed"}
    assert kept(specs, Needs(CHAT, prompt_tokens=60, output_tokens=40)) == ("small", "large")


def test_capabilities_and_tags_are_subsets() -> None:
    able = spec("able", capabilities=CHAT | {Capability.TOOLS}, tags=frozenset({"eu", "x"}))
    needs = Needs(CHAT | {Capability.TOOLS}, 1, required_tags=frozenset({"eu"}))
    found, exclusions = eligible([able, spec("plain")], needs)
    assert found == (able,)
    assert exclusions == {"plain": "lacks the tag eu, cannot do tools"}


def test_allow_and_deny() -> None:
    specs = [spec("a"), spec("b"), spec("c")]
    assert kept(specs, Needs(CHAT, 1)) == ("a", "b", "c")
    assert kept(specs, Needs(CHAT, 1, allow=frozenset({"a", "b"}))) == ("a", "b")
    assert kept(specs, Needs(CHAT, 1, allow=frozenset())) == ()
    assert kept(specs, Needs(CHAT, 1, allow=frozenset("ab"), deny=frozenset("a"))) == ("b",)


def test_an_expert_of_other_languages_is_left_out_only_when_the_language_is_known() -> None:
    specs = [spec("en", languages=frozenset({"en"})), spec("any")]
    found, exclusions = eligible(specs, Needs(CHAT, 1, language="de"))
    assert [one.id for one in found] == ["any"]
    assert exclusions == {"en": "does not speak 'de'"}
    assert kept(specs, Needs(CHAT, 1)) == ("en", "any")
    assert kept(specs, Needs(CHAT, 1, language="en")) == ("en", "any")
