"""How far one answer agrees with another. Pure.

Two experts that say the same are more often right than either alone, and what one says twice is
not two opinions: agreement is a feature of an answer given by a later stage, beside that answer's
own probabilities (Dekoninck et al., 2410.10347, section 5, use it for open answers).

Where both answers name a final result, the results are compared: a number by its value, anything
else by its words. Otherwise the shares of words in common count (Jaccard).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Final

__all__ = ["agreement_with", "final_result", "pair_agreement"]

_CHARS_MAX: Final = 20_000  # of an answer's end: what is compared has to be bounded
_SHORT_WORDS: Final = 5  # an answer this short is its own result
_MARKED: Final = (
    re.compile(r"\\boxed\{([^{}]*)\}"),
    re.compile(r"####[ \t]*([^\n]+)"),
    re.compile(r"\banswer\b[ \t]*(?:is\b[ \t]*[:=]?|[:=])[ \t]*([^\n]+)", re.IGNORECASE),
)
_WORD: Final = re.compile(r"[^\W_]+(?:[.,][^\W_]+)*")
_NUMBER: Final = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_NUMBER_ALONE: Final = re.compile(r"[^\w-]*(-?\d[\d,]*(?:\.\d+)?)\D{0,12}")


def agreement_with(text: str, earlier: Sequence[str]) -> float | None:
    """Mean of ``pair_agreement`` with each of ``earlier``, 0 to 1; None if there is none."""
    if not earlier:
        return None
    return sum(pair_agreement(text, other) for other in earlier) / len(earlier)


def pair_agreement(one: str, other: str) -> float:
    """0 to 1, symmetric; 1 for equal answers, whatever their case, spaces and punctuation.

    An answer without a word or a number agrees with none.
    """
    results = final_result(one), final_result(other)
    if results[0] is not None and results[1] is not None:
        return _same_result(results[0], results[1])
    return _overlap(_words(one), _words(other))


def final_result(text: str) -> str | None:
    """The result that an answer names, or a short answer itself; None where it names none.

    The last one counts: ``\\boxed{x}`` before ``#### x`` before "the answer is x".
    """
    end = unicodedata.normalize("NFKC", text[-_CHARS_MAX:])
    for marked in _MARKED:
        if found := marked.findall(end):
            return str(found[-1]).strip()
    return end.strip() if len(_words(end)) <= _SHORT_WORDS else None


def _same_result(one: str, other: str) -> float:
    values = _number(one), _number(other)
    if values[0] is not None and values[1] is not None:
        return float(values[0] == values[1])
    return _overlap(_words(one), _words(other))


def _number(result: str) -> float | None:
    """The value of a result that is a number, with a sign or a unit at most."""
    alone = _NUMBER_ALONE.fullmatch(result.strip())
    return float(alone[1].replace(",", "")) if alone else None


def _words(text: str) -> frozenset[str]:
    """Lower-case words; a number without thousands separators and trailing zeros."""
    plain = unicodedata.normalize("NFKC", text[-_CHARS_MAX:]).casefold()
    return frozenset(_plain(word) for word in _WORD.findall(plain))


def _plain(word: str) -> str:
    return f"{float(word.replace(',', '')):g}" if _NUMBER.fullmatch(word) else word


def _overlap(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / max(1, len(one | other))
