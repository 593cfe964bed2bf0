from __future__ import annotations

import pytest

from experts.types import Capability, ExpertSpec, Price, SourceKind
from gateway.language import LanguageOf, language_detector


def spec(languages: frozenset[str]) -> ExpertSpec:
    chat = frozenset({Capability.CHAT})
    return ExpertSpec("a", SourceKind.SCRIPTED, "echo", Price(), 100, chat, languages=languages)


@pytest.fixture(scope="module")
def language_of() -> LanguageOf:
    detector = language_detector([spec(frozenset({"en"}))])
    assert detector is not None
    return detector


def test_nobody_asks_where_no_expert_names_languages() -> None:
    assert language_detector([spec(frozenset())]) is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Wie heißt die Hauptstadt von Frankreich?", "de"),
        ("Quelle est la capitale de la France, et combien d'habitants a-t-elle ?", "fr"),
        ("What is the capital of France?", "en"),
        ("こんにちは、元気ですか", "ja"),
        # Too little to go by, or no language at all: nothing is said.
        ("ok", None),
        ("12*7?", None),
        ("SELECT name FROM users WHERE age > 30;", None),
        ("def f(x): return x+1", None),
        ("", None),
    ],
)
def test_a_language_is_named_only_when_it_is_sure(
    language_of: LanguageOf, text: str, code: str | None
) -> None:
    assert language_of(text) == code
