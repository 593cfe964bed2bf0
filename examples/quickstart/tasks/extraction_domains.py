"""What the texts of the extraction task are about: domains, their fields, and how a text says them.

A domain line is ``name``; a field line is ``key | type | values | sentence | sentence ...``. A
boolean has no values: its sentences come in two groups, true and false, separated by ``/``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from random import Random
from typing import Literal

from .task import DATA, Split

Value = str | int | float | bool | list[str] | None
FieldType = Literal["string", "integer", "number", "boolean", "array"]
HELDOUT_RESIDUE = 1
"""Numbers n (in hundredths where there are decimals) with n % 4 == 1 are held out."""

_WORDS: dict[Split, dict[str, str]] = {
    "train": {
        "FIRST": "Anna,Tom,Lucia,Omar,Mei,Jack,Sara,Ivan,Priya,Leo,Emma,Hugo,Aisha,Karl,Nina,Peter",
        "LAST": "Weber,Baker,Rossi,Haddad,Lin,Turner,Khan,Novak,Patel,Moreau,Clark,Silva,Berg,"
        "Olsen",
        "CITY": "Berlin,Madrid,Oslo,Chicago,Lyon,Prague,Dallas,Naples,Toronto,Warsaw,Seattle,Porto",
        "COMPANY": "Acme Tools,Globex,Initech,Umbra Media,Vertex Labs,Bluefin Foods,Stark Print",
        "STREET": "Main Street,Oak Avenue,Mill Road,Station Lane,Park Drive,King Street",
        "LETTERS": "ABCDEFGHJKLM",
        "MAIL": "example.com,mail.example.com",
        "YEAR": "2021,2022,2023,2024",
        "MINUTE": "00,15,30",
    },
    "heldout": {
        "FIRST": "Nadia,Ben,Yuki,Elena,Paul,Ines,Marek,Grace,Tariq,Sofia",
        "LAST": "Petrov,Carter,Sato,Costa,Meyer,Lopez,Dvorak,Hughes,Aziz,Lindgren",
        "CITY": "Vienna,Lisbon,Boston,Kyoto,Dublin,Turin,Tallinn,Denver",
        "COMPANY": "Nimbus Air,Orion Bank,Zephyr Games,Cobalt Steel,Juniper Health",
        "STREET": "Harbour Row,Elm Crescent,Castle Hill,Bridge Way",
        "LETTERS": "NPQRSTUVWXYZ",
        "MAIL": "example.org,post.example.org",
        "YEAR": "2025,2026",
        "MINUTE": "20,45,50",
    },
}


@dataclass(frozen=True)
class Field:
    """``says`` holds sentences with a ``{v}``; for a boolean, ``denies`` those that mean false."""

    key: str
    type: FieldType
    values: str
    says: tuple[str, ...]
    denies: tuple[str, ...] = ()


def _field(line: str) -> Field:
    key, kind, values, rest = (part.strip() for part in line.split("|", 3))
    yes, _, no = rest.partition(" / ") if kind == "boolean" else (rest, "", "")
    says, denies = (tuple(s.strip() for s in t.split("|") if s.strip()) for t in (yes, no))
    types: dict[str, FieldType] = {
        "string": "string",
        "integer": "integer",
        "number": "number",
        "boolean": "boolean",
        "array": "array",
    }
    return Field(key, types[kind], values, says, denies)


def domains(split: Split) -> dict[str, list[Field]]:
    """Fields of every domain of a split."""
    found: dict[str, list[Field]] = {}
    for line in (DATA / f"extraction_domains_{split}.txt").read_text(encoding="utf-8").splitlines():
        if "|" in line:
            found[next(reversed(found))].append(_field(line))
        else:
            found[line] = []
    return found


@cache
def _lines(stem: str) -> tuple[str, ...]:
    return tuple((DATA / f"{stem}.txt").read_text(encoding="utf-8").splitlines())


@cache
def _loose_sentences() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for line in _lines("extraction_loose_sentences_train"):
        kind, _, sentence = line.partition(" | ")
        found[kind] = (*found.get(kind, ()), sentence)
    return found


def _loose_field(line: str) -> Field:
    """A field that names itself: its sentences are general ones that mention its key."""
    field, sentences = _field(f"{line.rstrip()} | "), _loose_sentences()
    kind = {"array": "array", "boolean": "true"}.get(field.type, "value")
    said = field.key.replace("_", " ")
    says, denies = (
        tuple(sentence.replace("{k}", said) for sentence in sentences[k]) for k in (kind, "false")
    )
    return replace(field, says=says, denies=denies if field.type == "boolean" else ())


@cache
def loose_fields() -> tuple[Field, ...]:
    """Fields of no domain, for training: a model that only sees ten domains learns them by heart,
    and writes what it expects in place of what it reads."""
    return tuple(_loose_field(line) for line in _lines("extraction_loose_train"))


def _owned_number(rng: Random, low: int, high: int, split: Split) -> int:
    while True:
        n = rng.randint(low, high)
        if (n % 4 == HELDOUT_RESIDUE) == (split == "heldout"):
            return n


def _composed(rng: Random, kind: str, words: dict[str, list[str]]) -> str:
    """A value built from parts: names, addresses, codes, dates."""
    first, last = rng.choice(words["FIRST"]), rng.choice(words["LAST"])
    letters = words["LETTERS"][0]
    made = {
        "PERSON": f"{first} {last}",
        "EMAIL": f"{first.lower()}.{last.lower()}@{rng.choice(words['MAIL'])}",
        "PHONE": f"{rng.randint(200, 999)}-{rng.randint(1000, 9999)}",
        "ADDRESS": f"{rng.randint(2, 180)} {rng.choice(words['STREET'])}",
        "CODE": f"{rng.choice(letters)}{rng.choice(letters)}-{rng.randint(100, 9999)}",
        "DATE": f"{rng.choice(words['YEAR'])}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
        "TIME": f"{rng.randint(7, 21):02d}:{rng.choice(words['MINUTE'])}",
    }
    return made[kind] if kind in made else rng.choice(words[kind])


def _word(rng: Random, values: str, split: Split) -> str:
    if values == "WORDS":
        return " ".join(rng.sample(_lines("extraction_words_train"), 2))
    if values.isupper():
        return _composed(rng, values, {k: v.split(",") for k, v in _WORDS[split].items()})
    return rng.choice(values.split(","))


def draw_value(rng: Random, field: Field, split: Split) -> Value:
    """A value of the field's type that belongs to the split."""
    if field.type == "boolean":
        return rng.random() < 0.5
    if field.type == "integer":
        low, high = (int(x) for x in field.values.split(".."))
        return _owned_number(rng, low, high, split)
    if field.type == "number":
        low, high = (round(float(x) * 100) for x in field.values.split(".."))
        return _owned_number(rng, low, high, split) / 100
    if field.type == "array":
        wanted, drawn = rng.randint(1, 3), list[str]()
        while len(drawn) < wanted:
            word = _word(rng, field.values, split)
            drawn += [] if word in drawn else [word]
        return drawn
    return _word(rng, field.values, split)


def say(rng: Random, field: Field, value: Value) -> str:
    """One sentence that states ``value``."""
    if isinstance(value, bool):
        return rng.choice(field.says if value else field.denies)
    if isinstance(value, list):
        shown = value[0] if len(value) == 1 else f"{', '.join(value[:-1])} and {value[-1]}"
    else:
        shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return rng.choice(field.says).format(v=shown)
