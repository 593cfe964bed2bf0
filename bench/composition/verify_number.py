"""Verifier of arithmetic: the number that an answer ends with."""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_number(output: str) -> Decimal | None:
    """The number behind the last ``Answer:``, or else the last number of ``output``."""
    marked = re.findall(r"answer:\s*\**\s*[$€£]?\s*(-?\d[\d,]*(?:\.\d+)?)", output, re.I)
    found = marked or _NUMBER.findall(output)
    return Decimal(found[-1].replace(",", "")) if found else None


def number_is(output: str, wanted: float) -> bool:
    """Whether ``output`` ends with the number ``wanted``."""
    return final_number(output) == Decimal(str(wanted))
