"""Texts of the extraction task: entities with facts, said in sentences, notes or plain records."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from random import Random

from . import phrasing
from .json_values import Drawn, draw, type_name
from .phrasing import capital, expand, read_lines
from .task import Split

LOOSE_SHARE = 0.3
OPENING_SHARE = 0.15


@dataclass(frozen=True)
class Attribute:
    """``keys`` are names that a caller may ask for it by; ``verbs`` follow the subject;
    ``notes`` stand alone. A boolean has one list of each for true and one for false."""

    keys: tuple[str, ...]
    spec: str
    verbs: tuple[tuple[str, ...], ...]
    notes: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Domain:
    name: str
    keys: tuple[str, ...]
    spec: str
    pronoun: str
    attributes: tuple[Attribute, ...]


@dataclass(frozen=True)
class Fact:
    """A key that may be asked for, its JSON type and value; what the text says of it."""

    key: str
    type: str
    drawn: Drawn
    verb: str = ""
    note: str = ""


def _variants(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(
        tuple(phrase.strip() for phrase in part.split(";") if phrase.strip())
        for part in text.split("//")
    )


def _attribute(line: str) -> Attribute:
    keys, spec, verbs, notes = (part.strip() for part in line.split(" | "))
    return Attribute(tuple(keys.split(",")), spec, _variants(verbs), _variants(notes))


@cache
def domains(split: Split) -> tuple[Domain, ...]:
    """All domains of a split, from ``data/json_domains_<split>.txt``."""
    from .task import DATA

    found: list[Domain] = []
    text = (DATA / f"json_domains_{split}.txt").read_text(encoding="utf-8")
    for block in text.split("# ")[1:]:
        head, *lines = block.strip().splitlines()
        name, keys, spec, pronoun = (part.strip() for part in head.split(" | "))
        attributes = tuple(_attribute(line) for line in lines)
        found.append(Domain(name, tuple(keys.split(",")), spec, pronoun, attributes))
    return tuple(found)


def _said(rng: Random, phrases: tuple[str, ...], drawn: Drawn) -> str:
    return expand(rng, rng.choice(phrases)).format(v=drawn.said, m=drawn.said)


def _fact(rng: Random, split: Split, attribute: Attribute) -> Fact:
    key, which = rng.choice(attribute.keys), 0
    if attribute.spec == "BOOL":
        which = rng.randrange(2)
        drawn = Drawn(which == 0, "")
    else:
        drawn = draw(rng, split, attribute.spec)
    verb = _said(rng, attribute.verbs[which], drawn)
    note = _said(rng, attribute.notes[which], drawn)
    return Fact(key, type_name(attribute.spec), drawn, verb, note)


def _sentences(rng: Random, subject: str, pronoun: str, facts: list[Fact]) -> str:
    """Facts of one subject, one to three a sentence."""
    left, parts = [f.verb for f in facts], []
    who = subject
    while left:
        size = rng.choice((1, 1, 2, 2, 3))
        verbs, left = left[:size], left[size:]
        if len(verbs) == 2 and rng.random() < 0.2:
            relative = "which" if pronoun == "it" else "who"
            said = f"{who}, {relative} {verbs[0]}, {verbs[1]}"
        else:
            said = f"{who} {phrasing.spoken_list(rng, verbs) if len(verbs) > 1 else verbs[0]}"
        parts.append(capital(said) + ".")
        who = expand(rng, pronoun) if rng.random() < 0.8 else subject
    return " ".join(parts)


def _notes(rng: Random, subject: str, facts: list[Fact]) -> str:
    """A terse line, as in a list or a chat: ``Anna Weber, 34, nurse, from Oslo``."""
    notes = [f.note for f in facts]
    glue = rng.choice((", ", ", ", ", ", "; ", " | ", " - ", ". "))
    return subject + rng.choice((", ", ", ", ": ", " - ")) + glue.join(notes)


def _record(rng: Random, subject_key: str, subject: str, facts: list[Fact]) -> str:
    """Labelled values; a boolean has none, so its note stands for it."""
    rows = [f"{subject_key.replace('_', ' ')}: {subject}"]
    for fact in facts:
        label = fact.key.replace("_", " ")
        rows.append(f"{label}: {fact.drawn.said}" if fact.drawn.said else fact.note)
    if rng.random() < 0.5:
        rows = [capital(row) for row in rows]
    return rng.choice(("\n", ", ", "; ", ". ")).join(rows)


def entity_text(rng: Random, split: Split) -> tuple[str, list[Fact]]:
    """(text, its facts) about one subject of a domain; facts of one key never occur twice."""
    domain = rng.choice(domains(split))
    subject = draw(rng, split, domain.spec)
    key = rng.choice(domain.keys)
    facts: list[Fact] = []
    count = rng.choice((1, 2, 2, 3, 3, 3, 4, 4, 5))
    for attribute in rng.sample(domain.attributes, min(count, len(domain.attributes))):
        fact = _fact(rng, split, attribute)
        if fact.key != key and fact.key not in [f.key for f in facts]:
            facts.append(fact)
    subject_fact = Fact(key, type_name(domain.spec), subject)
    style = rng.random()
    if style < 0.62:
        text = _sentences(rng, _named(rng, domain.name, subject.said), domain.pronoun, facts)
    elif style < 0.85:
        text = _notes(rng, subject.said, facts)
    else:
        text = _record(rng, key, subject.said, facts)
    return text, [subject_fact, *facts]


def _named(rng: Random, domain: str, subject: str) -> str:
    """The subject as a sentence names it: an order is ``Order AB-12``, a lamp ``The desk lamp``."""
    named = {
        "order": ("Order {s}", "The order {s}", "Your order {s}"),
        "product": ("The {s}", "Our {s}", "This {s}"),
        "event": ("The {s}", "Our {s}"),
        "flight": ("Flight {s}", "{s}"),
        "house": ("The flat at {s}", "{s}", "The house at {s}"),
        "car": ("The {s}", "My {s}", "A {s}"),
        "recipe": ("The {s}", "This {s}"),
        "course": ("{s}", "The course {s}", "The {s} class"),
        "shipment": ("Parcel {s}", "Package {s}"),
        "talk": ('"{s}"', "The talk {s}"),
        "book": ("{s}", '"{s}"', "The book {s}"),
        "movie": ("{s}", '"{s}"', "The film {s}"),
    }
    return rng.choice(named.get(domain, ("{s}",))).format(s=subject)


def loose_text(rng: Random, split: Split) -> tuple[str, list[Fact]]:
    """(text, its facts) of unrelated fields that the sentences name: only reading helps."""
    facts, sentences = [], []
    for line in rng.sample(read_lines("json_loose_train"), rng.randint(2, 5)):
        key, spec = (part.strip() for part in line.split(" | "))
        drawn = draw(rng, split, spec)
        facts.append(Fact(key, type_name(spec), drawn))
        label = key.replace("_", " ")
        said = phrasing.say(rng, "json_phrases", "train", "loose", k=label, v=drawn.said)
        sentences.append(capital(said) if said[-1] == "." else said)
    if all(s[-1] == "." for s in sentences):
        return " ".join(sentences), facts
    return rng.choice(("\n", "; ", ". ")).join(s.rstrip(".") for s in sentences), facts


def draw_text(rng: Random, split: Split) -> tuple[str, list[Fact]]:
    """(text, what it states), now and then with a greeting before or chatter behind."""
    loose = split == "train" and rng.random() < LOOSE_SHARE
    text, facts = (loose_text if loose else entity_text)(rng, split)
    if rng.random() < OPENING_SHARE:
        text = f"{phrasing.say(rng, 'json_phrases', split, 'opening')} {text}"
    if rng.random() < OPENING_SHARE:
        text += ("" if text[-1] == "." else ".") + " "
        text += phrasing.say(rng, "json_phrases", split, "closing")
    return text, facts
