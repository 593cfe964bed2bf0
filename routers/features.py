"""What the estimators see of a routing text besides its embedding: signs and hashed word n-grams.

Pure Python and numpy, a millisecond for a full window, so that it can run on every request. Word
pairs catch what a 48-token embedding does not: the set phrases of a subject or of a task, answer
formats, operators. Characters of scripts without spaces count as words of their own.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "SIGN_COUNT",
    "SIGN_NAMES",
    "HashedText",
    "Vocabulary",
    "fit_vocabulary",
    "hashed",
    "signs",
]

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]

_WORD: Final = re.compile(
    # One character of a script that is written without spaces, a word, or one other sign.
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
    "|[^\\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+|[^\\w\\s]"
)
_CHOICE: Final = re.compile(r"(?:^|\s)\(?[A-J][.):]\s")
_CODE: Final = re.compile(r"\b(?:def|return|import|class|for|while|print|assert|lambda|SELECT)\b")
_MATHS: Final = frozenset("+-*/=^<>%√∑∫≤≥±×÷π$\\")
_QUESTION: Final = re.compile(r"\b(?:what|which|who|whom|whose|when|where|why|how)\b", re.I)
_NEGATION: Final = re.compile(r"\b(?:not|never|except|cannot|false|incorrect|least)\b", re.I)
_STEPS: Final = re.compile(r"\b(?:step|steps|explain|reasoning|show|prove|derive)\b", re.I)
_OTHER_CHOICES: Final = re.compile(r"\b(?:none|all|both|neither|either|only)\b", re.I)
_LONG_WORD_CHARS: Final = 9
_QUANTITY: Final = re.compile(r"\d+(?:[.,]\d+)*")
_LARGEST_QUANTITY: Final = 1e12

SIGN_NAMES: Final = (
    "log characters",
    "log words",
    "characters per word",
    "share of digits",
    "share of capitals",
    "share of maths signs",
    "share beyond ASCII",
    "share of distinct words",
    "log quantities",
    "log largest quantity",
    "fractions and decimals",
    "choices",
    "log words before the choices",
    "log words in the choices",
    "sentences",
    "commas",
    "quotation marks",
    "question words",
    "negations",
    "code words",
    "brackets",
    "blank to fill",
    "ends as a question",
    "share of long words",
    "spread of word lengths",
    "log mean words of a choice",
    "spread of the choices' lengths",
    "share of choices with digits",
    "share of one-word choices",
    "words shared by question and choices",
    "words shared among choices",
    "share of choices that refer to others",
    "line of thought asked for",
)
SIGN_COUNT: Final = len(SIGN_NAMES)


def signs(text: str) -> Float64Array:
    """[SIGN_COUNT] plain features of a routing text, see ``SIGN_NAMES``. All finite."""
    words = text.split()
    starts = [match.start() for match in _CHOICE.finditer(text)]
    question = text[: starts[0]] if starts else text
    ends = [*starts[1:], len(text)] if starts else []
    choices = [text[a:b].split()[1:] for a, b in zip(starts, ends, strict=True)]
    return np.array(
        [
            *_size_signs(text, words, question, choices),
            *_content_signs(text),
            *_word_signs(words),
            *_choice_signs(question, choices),
            math.log1p(len(_STEPS.findall(text))),
        ]
    )


def _size_signs(
    text: str, words: Sequence[str], question: str, choices: Sequence[Sequence[str]]
) -> list[float]:
    length, count = max(1, len(text)), max(1, len(words))
    quantities = _QUANTITY.findall(text)
    largest = max((_value(q) for q in quantities), default=0.0)
    return [
        math.log1p(length),
        math.log1p(count),
        length / count,
        sum(map(str.isdigit, text)) / length,
        sum(map(str.isupper, text)) / length,
        sum(sign in _MATHS for sign in text) / length,
        0.0 if text.isascii() else sum(ord(sign) > 127 for sign in text) / length,
        len(set(words)) / count,
        math.log1p(len(quantities)),
        math.log1p(min(largest, _LARGEST_QUANTITY)),
        sum(not q.isdigit() for q in quantities),
        len(choices),
        math.log1p(len(question.split())),
        math.log1p(sum(map(len, choices))),
    ]


def _content_signs(text: str) -> list[float]:
    return [
        math.log1p(text.count(". ") + text.count("? ") + text.count("! ")),
        math.log1p(text.count(",")),
        math.log1p(text.count('"') + text.count("“")),
        math.log1p(len(_QUESTION.findall(text))),
        math.log1p(len(_NEGATION.findall(text))),
        math.log1p(len(_CODE.findall(text))),
        math.log1p(sum(text.count(sign) for sign in "([{")),
        float("__" in text),
        float(text.rstrip().endswith("?")),
    ]


def _word_signs(words: Sequence[str]) -> list[float]:
    """Rare words are long words, near enough, and need no frequency list."""
    lengths = np.fromiter(map(len, words), dtype=np.float64, count=len(words))
    if not len(lengths):
        return [0.0, 0.0]
    return [float((lengths >= _LONG_WORD_CHARS).mean()), math.log1p(float(lengths.std()))]


def _choice_signs(question: str, choices: Sequence[Sequence[str]]) -> list[float]:
    """How the offered answers look: their number and length, and what they have in common."""
    if not choices:
        return [0.0] * 7
    lengths = np.array([len(choice) for choice in choices], dtype=np.float64)
    sets = [{word.lower().strip(".,;") for word in choice} for choice in choices]
    union = set().union(*sets)
    asked = {word.lower().strip(".,;?") for word in question.split()}
    joined = [" ".join(choice) for choice in choices]
    return [
        math.log1p(float(lengths.mean())),
        float(lengths.std() / (1 + lengths.mean())),
        sum(any(map(str.isdigit, choice)) for choice in joined) / len(choices),
        float((lengths <= 1).mean()),
        len(union & asked) / max(1, len(union)),
        1.0 - len(union) / max(1, sum(map(len, sets))),
        sum(bool(_OTHER_CHOICES.search(choice)) for choice in joined) / len(choices),
    ]


def _value(quantity: str) -> float:
    """A number as written, its separators dropped; long ones are cut, their size is enough."""
    return float(quantity.replace(",", "").replace(".", "", quantity.count(".") - 1)[:15] or 0)


@dataclass(frozen=True, slots=True)
class HashedText:
    """Word and word-pair counts: ``ids`` sorted 32-bit hashes, ``counts`` of the same length."""

    ids: NDArray[np.int64]
    counts: Float32Array


def hashed(text: str) -> HashedText:
    """CRC-32 of every lower-case word and pair of neighbours, with how often each occurs."""
    words = [word.encode() for word in _WORD.findall(text.lower())]
    found = Counter(map(zlib.crc32, words))
    found.update(zlib.crc32(b"%b %b" % pair) for pair in pairwise(words))
    ids = np.fromiter(found.keys(), dtype=np.int64, count=len(found))
    counts = np.fromiter(found.values(), dtype=np.float32, count=len(found))
    order = np.argsort(ids)
    return HashedText(ids[order], counts[order])


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The hashes that training saw often enough: ``ids`` [v] sorted, ``idf`` [v] (Jones 1972)."""

    ids: NDArray[np.int64]
    idf: Float32Array

    def weigh(self, text: HashedText) -> tuple[NDArray[np.int64], Float32Array]:
        """Columns of the vocabulary and their TF-IDF weights, the row at Euclidean length 1.

        Term frequency is sub-linear, 1 + ln(count), and idf smoothed, as in scikit-learn.
        """
        if not len(self.ids):
            return np.empty(0, np.int64), np.empty(0, np.float32)
        at = np.minimum(np.searchsorted(self.ids, text.ids), len(self.ids) - 1)
        known = self.ids[at] == text.ids
        columns = at[known]
        weights = (1 + np.log(text.counts[known])) * self.idf[columns]
        norm = float(np.linalg.norm(weights))
        return columns, weights / norm if norm else weights


def fit_vocabulary(texts: Sequence[HashedText], rows_min: int = 2) -> Vocabulary:
    """Keep what at least ``rows_min`` texts hold."""
    if not texts:
        raise ValueError("a vocabulary needs texts")
    ids, rows = np.unique(np.concatenate([text.ids for text in texts]), return_counts=True)
    kept = rows >= rows_min
    idf = np.log((1 + len(texts)) / (1 + rows[kept])) + 1
    return Vocabulary(ids[kept], idf.astype(np.float32))
