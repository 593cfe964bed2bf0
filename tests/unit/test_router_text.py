from __future__ import annotations

import pytest

from routers.text import routing_text


def test_long_prompt_keeps_its_head_and_its_tail() -> None:
    text = "Summarise this. " + "filler " * 5_000 + "What is the total?"
    window = routing_text(text, max_chars=300)
    assert window.startswith("Summarise this.")
    assert window.endswith("What is the total?")
    assert len(window) <= 300


def test_head_gets_two_thirds_of_a_window_that_splits_evenly() -> None:
    window = routing_text("a" * 500 + "b" * 500, max_chars=305)
    assert window == "a" * 200 + " ... " + "b" * 100


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a \t\n b  ", "a b"),
        ("pay\u200bpal \u202eevil\u202c", "paypal evil"),
        ("ﬁne Ⅳ ｆｕｌｌ", "fine IV full"),
        ("e\u200b\u0301", "é"),
        ("bad \ud800 surrogate", "bad surrogate"),
        ("bell\x07 nul\x00 del\x7f nel\x85x", "bell nul del nel x"),
        ("\u200b\ufeff", ""),
    ],
)
def test_normalisation(raw: str, clean: str) -> None:
    assert routing_text(raw) == clean


def test_middle_of_a_long_prompt_does_not_matter() -> None:
    head, tail = "question first " * 2_000, " question last" * 2_000
    first = routing_text(head + "x" * 100_000 + tail, max_chars=1_000)
    assert first == routing_text(head + "y" * 900_000 + tail, max_chars=1_000)


def test_window_too_small_for_both_ends_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 15"):
        routing_text("abc", max_chars=14)
