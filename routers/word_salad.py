"""Runs of words that no sentence holds together: the mark of an optimised router attack.

Confounder gadgets (Shafran et al., "Rerouting LLM Routers", arXiv 2501.01818, section 4) are
prefixes of about ten tokens found by hill climbing on a router's score. Natural text has a function
word, a number or a punctuation mark every few words; a gadget has none. Such a run is left out of
what the router reads (never of what the expert gets). A text that is one run from end to end, a
keyword search say, stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

__all__ = ["without_word_salad"]

_RUN_WORDS: Final = 6  # rare in natural prompts, sure to be reached by a ten-word gadget
_KEPT_WORDS_MIN: Final = 3  # with less left there is nothing to route on
_ANCHORS_MIN: Final = 1

_WORDS: Final = """
a about after again all also am an and any are as ask at back be because been before being
between both but by can could day did do does done down each even every few find first for
from get give go good got had has have he her here him his how i if in into is it its just
know last less let like long made make many may me mean more most much must my need new no
nor not now of off on once one only or other our out over own per please put same say see
she should show so some still such take tell than that the their them then there these they
thing this those three through time to too two under until up us use used using very want
was way we well were what when where which while who whose why will with without would write
year yes yet you your der die das und ist ein eine nicht mit auf von zu den dem im wie was
ich wir sie es für le la les des du un une et est que qui dans pour pas sur avec je il vous
au aux ce el los las y en por con una como se su lo al es del che di per non sono gli e da
dos um uma em os na het een van op voor te dat zijn niet
"""
_FUNCTION_WORDS: Final = frozenset(_WORDS.split())


def without_word_salad(text: str) -> tuple[str, int]:
    """The text less its runs of ``_RUN_WORDS`` or more words without an anchor, and their number.

    An anchor is a function word, or anything that is not letters alone. Linear in the text.
    """
    words = text.split()
    if len(words) < _RUN_WORDS + _KEPT_WORDS_MIN:
        return text, 0
    kept = _outside_runs(words)
    removed = len(words) - len(kept)
    if not removed or len(kept) < _KEPT_WORDS_MIN or sum(map(_anchor, kept)) < _ANCHORS_MIN:
        return text, 0
    return " ".join(kept), removed


def _outside_runs(words: Sequence[str]) -> list[str]:
    kept: list[str] = []
    run: list[str] = []
    for word in words:
        if not _anchor(word):
            run.append(word)
            continue
        if len(run) < _RUN_WORDS:
            kept += run
        run = []
        kept.append(word)
    return kept if len(run) >= _RUN_WORDS else kept + run


def _anchor(word: str) -> bool:
    return not word.isalpha() or word.lower() in _FUNCTION_WORDS
