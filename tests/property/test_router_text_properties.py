from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from routers.text import routing_text

anything = st.text(
    alphabet=st.one_of(
        st.characters(),
        st.characters(categories=["Cs", "Cc", "Cf", "Mn", "Zs"]),
        st.sampled_from("a ﷺ\u0301\u200b"),
    ),
    max_size=400,
)


@given(anything, st.integers(15, 120))
def test_bounded_clean_and_idempotent(text: str, max_chars: int) -> None:
    window = routing_text(text, max_chars=max_chars)
    assert len(window) <= max_chars
    assert window == " ".join(window.split())
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in window)
    window.encode("utf-8")
    assert routing_text(window, max_chars=max_chars) == window


@given(st.text(max_size=60))
def test_invisible_characters_change_nothing(text: str) -> None:
    hidden = "\u200b".join(text)
    assert routing_text(hidden) == routing_text(text)
