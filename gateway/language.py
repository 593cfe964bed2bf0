"""Which language a prompt is in, for experts that were made for some languages only.

A prompt of a few words or of code belongs to no language with any certainty; then nothing is said,
and nobody is excluded for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

from experts.types import ExpertSpec

__all__ = ["LanguageOf", "language_detector"]

LanguageOf = Callable[[str], str | None]

_CHARS = 600  # 0.2 ms; more text does not make the answer surer
_CONFIDENCE_MIN = 0.7  # of the identifier's calibrated probability


def language_detector(specs: Iterable[ExpertSpec]) -> LanguageOf | None:
    """Text to ISO 639 code, or None where it is not sure; blocking for the model's load.

    None when no expert names languages: nobody would ask.
    """
    if not any(spec.languages for spec in specs):
        return None
    _identifier()
    return _language_of


def _language_of(text: str) -> str | None:
    code, confidence = _identifier().classify(text[:_CHARS])
    return str(code) if confidence >= _CONFIDENCE_MIN else None


@lru_cache(maxsize=1)
def _identifier() -> Any:
    # Imported here: it takes a second or two, and most catalogues do not need it.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
