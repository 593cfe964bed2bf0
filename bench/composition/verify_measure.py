"""Verifier of conversions: dates, times, durations and measures, however they are written."""

from __future__ import annotations

import calendar
import re
from dataclasses import dataclass
from decimal import Decimal

MONTHS = tuple(calendar.month_name)[1:]
_UNITS = {
    "km": "kilometre kilometer",
    "m": "metre meter",
    "cm": "centimetre centimeter",
    "mm": "millimetre millimeter",
    "ft": "foot feet",
    "in": "inch inches",
    "yd": "yard",
    "kg": "kilogram kilo",
    "g": "gram",
    "mg": "milligram",
    "t": "tonne ton",
    "lb": "pound lbs",
    "oz": "ounce",
    "l": "litre liter",
    "ml": "millilitre milliliter",
    "cl": "centilitre centiliter",
    "dl": "decilitre deciliter",
    "qt": "quart",
    "gal": "gallon",
    "h": "hour hr hrs",
    "min": "minute mins",
    "s": "second sec secs",
    "gb": "gigabyte",
    "mb": "megabyte",
    "kb": "kilobyte",
    "f": "fahrenheit",
    "c": "celsius",
}
_SHORT = {
    form: short
    for short, names in _UNITS.items()
    for name in names.split()
    for form in (name, f"{name}s")
}


@dataclass(frozen=True)
class Meaning:
    """What a short answer says, in a form that equal answers share."""

    kind: str
    value: str
    unit: str = ""

    def agrees(self, other: Meaning) -> bool:
        """Equal values; a unit may be left out, but two units must be the same."""
        units_clash = self.unit and other.unit and self.unit != other.unit
        return (self.kind, self.value) == (other.kind, other.value) and not units_clash


def _clean(text: str) -> str:
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.lower())
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text)
    return re.sub(r"[*`\"'$]|°", " ", text).strip(" .!\n")


def _date_meaning(text: str) -> Meaning | None:
    """A written-out date, in either order; the notation (words or digits) is part of it."""
    names = "|".join(m.lower() for m in MONTHS)
    found = re.fullmatch(rf"(\d+)(?:st|nd|rd|th)?(?: of)? ({names}),? (\d{{4}})", text)
    if found:
        return Meaning("long date", f"{found[3]} {found[2]} {int(found[1])}")
    found = re.fullmatch(rf"({names}) (\d+)(?:st|nd|rd|th)?,? (\d{{4}})", text)
    if found:
        return Meaning("long date", f"{found[3]} {found[1]} {int(found[2])}")
    return None


def _duration_meaning(text: str) -> Meaning | None:
    found = re.fullmatch(r"(\d+) ?h(?:ours?|rs?)?,?(?: and)? ?(\d+) ?m(?:in(?:utes?|s)?)?", text)
    return Meaning("duration", str(int(found[1]) * 60 + int(found[2]))) if found else None


def meaning(text: str) -> Meaning:
    """The meaning of a short answer: a time, date, duration, measure, or just these words."""
    text = re.sub(r"\s+", " ", _clean(text)).strip()
    if found := re.fullmatch(r"(\d{1,2}):(\d{2})(?::00)? ?([ap]m)?(?: h(?:ours?)?)?", text):
        return Meaning("time", f"{int(found[1])}:{found[2]}{found[3] or ''}")
    if found := re.fullmatch(r"(\d{1,2}) ?([ap]m)", text):
        return Meaning("time", f"{int(found[1])}:00{found[2]}")
    if known := _date_meaning(text) or _duration_meaning(text):
        return known
    if found := re.fullmatch(r"(-?\d+(?:\.\d+)?)(?: (?:degrees))? ?([a-z/ ]*)", text):
        unit = found[2].strip()
        value = Decimal(found[1]).normalize()
        return Meaning("measure", f"{value:f}", _SHORT.get(unit, unit))
    return Meaning("words", text)


_NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?"


def states(output: str, wanted: list[str]) -> bool:
    """Whether ``output`` ends in one of the ``wanted`` answers.

    What stands behind the last ``Answer:`` counts, or else the whole output when it is as short as
    an answer; failing both, prose counts when its last sentence states the answer word for word.
    """
    accepted = [meaning(w) for w in wanted]
    marked = re.findall(r"answer:\s*(.+)", output, re.I)
    if marked:
        return any(meaning(marked[-1]).agrees(m) for m in accepted)
    lines = [line for line in output.strip().splitlines() if line.strip()]
    if not lines:
        return False
    if any(meaning(lines[-1]).agrees(m) for m in accepted):
        return True
    sentence = _clean(re.split(r"(?<=[.!?])\s", lines[-1].strip())[-1])
    tail = re.split(r"\b(?:is|are|be|to|on|at|equals|as)\b|=", sentence)[-1]
    if any(meaning(tail).agrees(m) for m in accepted):
        return True
    said = [re.escape(_clean(w)) for w in wanted if not re.fullmatch(_NUMBER, w.strip())]
    return any(re.search(rf"(?<![\w.:-]){w}(?![\w:-])", sentence) for w in said)
