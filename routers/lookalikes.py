"""Letters of other scripts that are drawn like Latin ones, folded where the text is Latin.

An attacker writes "ѕеlесt" with Cyrillic letters, and a tokenizer sees an unknown word. The rule
follows Unicode Technical Standard 39, section 4 (confusable detection) in a small: a word is folded
only when every letter in it that is not ASCII has a Latin look-alike, and only in a text that is
mostly ASCII letters, so that Russian and Greek prose is left alone.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Final

__all__ = ["fold_lookalikes"]

_PAIRS: Final = {
    "АаӐӑ": "a", "Вв": "b", "СсϹϲ": "c", "Ԁԁ": "d", "Ее": "e", "Һһ": "h", "ІіӀӏΙι": "i", "Јј": "j",
    "КкΚκ": "k", "Мм": "m", "НΗ": "h", "п": "n", "ОоΟοօ": "o", "РрΡρ": "p", "Ԛԛ": "q", "Ѕѕ": "s",
    "ТтΤτ": "t", "ΥуУυ": "y", "νѵѴ": "v", "Ԝԝ": "w", "ХхΧχ": "x", "Ζ": "z", "Αα": "a", "Β": "b",
    "Εε": "e", "Μ": "m", "Ν": "n", "ɡ": "g", "ɑ": "a", "ı": "i", "ʟ": "l",
}  # fmt: skip
_FOLDED: Final = {ord(letter): latin for letters, latin in _PAIRS.items() for letter in letters}
_LETTERS: Final = "".join(map(chr, _FOLDED))
_SUSPECT_WORD: Final = re.compile(rf"[A-Za-z0-9{_LETTERS}]*[{_LETTERS}][A-Za-z0-9{_LETTERS}]*")
_ZALGO: Final = re.compile(r"[\u0300-\u036f\u0489\u20d0-\u20f0]")


def fold_lookalikes(text: str) -> str:
    """``text`` (already NFKC) with look-alike words in Latin letters and stacked marks removed.

    A folded word is lower case where it was folded; the shipped embedders read no case.
    """
    if text.isascii():
        return text
    # What a removed mark kept apart may compose now, and blanks may meet.
    bare = " ".join(unicodedata.normalize("NFKC", _ZALGO.sub("", text)).split())
    ascii_letters = sum(c.isascii() and c.isalpha() for c in bare)
    if 2 * ascii_letters < sum(map(str.isalpha, bare)):
        return bare
    return _SUSPECT_WORD.sub(_folded_word, bare)


def _folded_word(match: re.Match[str]) -> str:
    start, end = match.span()
    text = match.string
    if (start and text[start - 1].isalpha()) or (end < len(text) and text[end].isalpha()):
        return match.group()  # part of a word with letters that are no look-alikes
    return match.group().translate(_FOLDED)
