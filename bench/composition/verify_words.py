"""Verifier of general knowledge: the answer, said in whole words."""

from __future__ import annotations

import re


def mentions(output: str, accepted: list[str]) -> bool:
    """Whether one of ``accepted`` stands in ``output`` as whole words, case apart."""
    return any(
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", output, re.I) is not None for word in accepted
    )
