"""What of a prompt the router looks at: a normalised, bounded window over its head and tail."""

from __future__ import annotations

import re
import unicodedata
from typing import Final

from routers.lookalikes import fold_lookalikes
from routers.word_salad import without_word_salad

__all__ = ["ROUTING_TEXT_MAX_CHARS", "routing_text", "windowed"]

ROUTING_TEXT_MAX_CHARS: Final = 2_000
"""Default bound; about 450 English tokens, more than any shipped embedder reads."""

_MARKER: Final = " ... "
_MIN_CHARS: Final = 3 * len(_MARKER)
_RAW_WINDOW_FACTOR: Final = 4  # room for runs of blanks and for stripped characters

# Controls that are not white space, soft hyphen, zero-width and bidirectional marks, variation
# selectors, lone surrogates (a JSON string may hold them, a tokenizer may not) and tag characters.
_INVISIBLE: Final = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\ud800-\udfff\ufe00-\ufe0f\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e0fff]"
)


def routing_text(text: str, *, max_chars: int = ROUTING_TEXT_MAX_CHARS, harden: bool = True) -> str:
    """Normalise ``text`` and keep at most ``max_chars`` characters, from its head and its tail.

    NFKC, invisible characters removed, white space collapsed; with ``harden`` (off only to measure
    what it is worth) look-alike letters folded and word salad left out. Two thirds of a long
    prompt's window come from its head, where the instruction usually is, one third from its tail,
    where it is when data came first. The work is bounded by ``max_chars``, not by the length of
    ``text``. Idempotent. Raises ValueError when ``max_chars`` is too small to hold both ends.
    """
    if max_chars < _MIN_CHARS:
        raise ValueError(f"max_chars must be at least {_MIN_CHARS}, got {max_chars}")
    window = _window(text, max_chars)
    return without_word_salad(fold_lookalikes(window))[0] if harden else window


def _window(text: str, max_chars: int) -> str:
    raw_window = _RAW_WINDOW_FACTOR * max_chars
    if len(text) <= 2 * raw_window:
        whole = _normalised(text)
        if len(whole) <= max_chars:
            return whole
        head = tail = whole
    else:
        head, tail = _normalised(text[:raw_window]), _normalised(text[-raw_window:])
    head_chars, tail_chars = windowed(max_chars - len(_MARKER))
    return f"{head[:head_chars].rstrip()}{_MARKER}{tail[-tail_chars:].lstrip()}".strip()


def windowed(size: int) -> tuple[int, int]:
    """Split a window of ``size`` units into those of its head and those of its tail."""
    tail = size // 3
    return size - tail, tail


def _normalised(text: str) -> str:
    if text.isascii() and text.isprintable():
        return " ".join(text.split())
    return " ".join(unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).split())
