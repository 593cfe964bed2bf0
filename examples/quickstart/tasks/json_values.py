"""Values that the texts of the extraction task state, and how a text writes them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

from .phrasing import pool, read_lines, spoken_list
from .task import Split

Value = str | int | float | bool | list[str] | None
HELDOUT_RESIDUE = 1
"""Numbers n (in tenths or hundredths where there are decimals) with n % 4 == 1 are held out."""

_ONSETS = pool("b br c ch d dr f g gr h j k kl l m n p pr r s sh st t tr v w z")
_VOWELS = pool("a e i o u ai ea io ou")
_ENDS = pool("n r s l x th m nd rk st")
_NUMBER_WORDS = pool("zero one two three four five six seven eight nine ten eleven twelve")


@dataclass(frozen=True)
class Drawn:
    """A value and the words that state it."""

    value: Value
    said: str


@cache
def pools(split: Split) -> dict[str, tuple[str, ...]]:
    """Lists of words by name; the held-out split has its own wherever a list is about names."""
    found: dict[str, tuple[str, ...]] = {}
    for line in read_lines(f"json_values_{split}"):
        key, _, values = line.partition(" | ")
        found[key] = tuple(values.split(","))
    return found


def pick(rng: Random, split: Split, pool: str) -> str:
    own = pools(split)
    return rng.choice(own.get(pool) or pools("train")[pool])


def invented_word(rng: Random, split: Split) -> str:
    """A name that nobody has: only reading can reproduce it. The last letter tells the splits."""
    parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((1, 2, 2)))]
    end = rng.choice(_ENDS) if split == "train" else rng.choice(("gu", "lyd", "bri"))
    return ("".join(parts) + end).capitalize()


def owned_number(rng: Random, low: int, high: int, split: Split) -> int:
    while True:
        n = rng.randint(low, high)
        if (n % 4 == HELDOUT_RESIDUE) == (split == "heldout"):
            return n


def _person(rng: Random, split: Split) -> str:
    last = pick(rng, split, "LAST") if rng.random() < 0.65 else invented_word(rng, split)
    first = pick(rng, split, "FIRST") if rng.random() < 0.85 else invented_word(rng, split)
    return first if rng.random() < 0.2 else f"{first} {last}"


def _date(rng: Random, split: Split) -> str:
    year, day = rng.randint(2018, 2027), owned_number(rng, 1, 28, split)
    number = rng.randint(1, 12)
    month = pools("train")["MONTH"][number - 1]
    return rng.choice(
        (
            f"{year}-{number:02}-{day:02}",
            f"{day} {month} {year}",
            f"{month} {day}, {year}",
            f"{day}/{number}/{year}",
            f"{month} {day}",
            f"{day} {month}",
            f"{day:02}.{number:02}.{year}",
            f"{pick(rng, split, 'WEEKDAY')}",
        )
    )


def _time(rng: Random, split: Split) -> str:
    hour, minute = rng.randint(0, 23), pick(rng, split, "MINUTE")
    if rng.random() < 0.65:
        return f"{hour:02}:{minute}" if rng.random() < 0.7 else f"{hour}:{minute}"
    half, shown = ("am", "pm")[hour >= 12], hour % 12 or 12
    return rng.choice((f"{shown} {half}", f"{shown}:{minute} {half}", f"{shown}{half}"))


def _code(rng: Random, split: Split) -> str:
    letters = "ABCDEFGHJKLM" if split == "train" else "NPQRSTUVWXYZ"
    head = "".join(rng.choice(letters) for _ in range(rng.choice((1, 2, 2, 3))))
    number = owned_number(rng, 10, 99999, split)
    return head + rng.choice(("-", "", "-", " ", "#")) + str(number)


def _email(rng: Random, split: Split) -> str:
    first = (pick(rng, split, "FIRST") + rng.choice(("", f".{pick(rng, split, 'LAST')}"))).lower()
    user = "".join(c for c in first if c.isascii() and (c.isalnum() or c == "."))
    number = rng.choice(("", str(owned_number(rng, 1, 99, split))))
    return f"{user}{number}@{pick(rng, split, 'MAIL')}"


def _phone(rng: Random, split: Split) -> str:
    a, b = rng.randint(200, 999), owned_number(rng, 1000, 9999, split)
    return rng.choice((f"555-{b}", f"{a}-555-{b}", f"0{a} {b}", f"+1 {a} 555 {b}", f"+44 {a} {b}"))


def _name(rng: Random, split: Split, pool: str) -> str:
    if rng.random() < 0.7:
        return pick(rng, split, pool)
    ends = (" Ltd", " Group", "", "") if pool == "COMPANY" else ("",)
    return invented_word(rng, split) + rng.choice(ends)


def _words(rng: Random, split: Split) -> str:
    return invented_word(rng, split) + rng.choice(("", " " + invented_word(rng, split).lower()))


def _text(rng: Random, split: Split, kind: str) -> str:
    first = pick(rng, split, "FIRST")
    if kind in ("CITY", "COMPANY", "TEAM", "PET", "HOTEL", "TITLE", "EVENT"):
        return _name(rng, split, kind)
    made = {
        "PERSON": _person,
        "DATE": _date,
        "TIME": _time,
        "CODE": _code,
        "EMAIL": _email,
        "PHONE": _phone,
        "WORDS": _words,
    }
    if kind in made:
        return made[kind](rng, split)
    if kind == "FLIGHT":
        return f"{rng.choice('ABKLQSU')}{rng.choice('ABFHXZ')}{owned_number(rng, 10, 9999, split)}"
    if kind == "GATE":
        return f"{rng.choice('ABCDEF')}{owned_number(rng, 1, 60, split)}"
    if kind == "DOCTOR":
        return f"Dr. {pick(rng, split, 'LAST')}"
    if kind == "ADDRESS":
        return f"{owned_number(rng, 1, 250, split)} {pick(rng, split, 'STREET')}"
    if kind == "URL":
        return f"www.{first.lower()}{invented_word(rng, split).lower()}.com"
    return pick(rng, split, kind)


def _grouped(rng: Random, n: int) -> str:
    return f"{n:,}" if n >= 1000 and rng.random() < 0.5 else str(n)


def _number(rng: Random, split: Split, kind: str, span: str) -> Drawn:
    low, high = span.split("..")
    if kind == "FLOAT":
        tenths = owned_number(rng, round(float(low) * 10), round(float(high) * 10), split)
        shown = f"{tenths / 10:.1f}"
        return Drawn(
            int(tenths / 10) if tenths % 10 == 0 else tenths / 10, shown.removesuffix(".0")
        )
    n = owned_number(rng, int(low), int(high), split)
    if kind == "SMALL" and n < len(_NUMBER_WORDS) and rng.random() < 0.35:
        return Drawn(n, _NUMBER_WORDS[n])
    return Drawn(n, _grouped(rng, n))


def _money(rng: Random, split: Split) -> Drawn:
    """The number alone is the value; the currency is how it is said."""
    cents = owned_number(rng, 100, 90000, split)
    if rng.random() < 0.55:
        whole = owned_number(rng, 1, 3000, split)
        value: float = whole
        said = _grouped(rng, whole)
    else:
        value, said = cents / 100, f"{cents / 100:.2f}"
    sign = pick(rng, split, "CURRENCY")
    word = {"$": "dollars", "€": "euros", "£": "pounds"}[sign]
    code = {"$": "USD", "€": "EUR", "£": "GBP"}[sign]
    forms = (f"{sign}{said}", f"{sign}{said}", f"{said} {word}", f"{said} {code}", f"{said} {sign}")
    return Drawn(value, rng.choice(forms))


def draw(rng: Random, split: Split, spec: str) -> Drawn:
    """A value of a kind: ``INT 1..9``, ``LIST FOOD``, ``ENUM a,b``, ``MONEY``, or a text kind."""
    kind, _, rest = spec.partition(" ")
    if kind in ("INT", "SMALL", "FLOAT"):
        return _number(rng, split, kind, rest)
    if kind == "YEAR":
        year = owned_number(rng, 1850, 2024, split)
        return Drawn(year, str(year))
    if kind == "MONEY":
        return _money(rng, split)
    if kind == "LIST":
        items: list[str] = []
        for _ in range(rng.choice((2, 2, 3, 3, 4))):
            item = _text(rng, split, rest)
            if item not in items:
                items.append(item)
        return Drawn(items, spoken_list(rng, items))
    said = rng.choice(rest.split(",")) if kind == "ENUM" else _text(rng, split, kind)
    return Drawn(said, said)


def type_name(spec: str) -> str:
    """The JSON Schema type of a kind."""
    kind = spec.split(" ")[0]
    if kind in ("INT", "SMALL", "YEAR"):
        return "integer"
    if kind in ("FLOAT", "MONEY"):
        return "number"
    return {"LIST": "array", "BOOL": "boolean"}.get(kind, "string")
