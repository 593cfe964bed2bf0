"""Phrasings with alternatives, and the small slips that people make when they type.

``[a|b|]`` stands for one of its alternatives, each equally likely; brackets nest. One line of a
phrase file so stands for many sentences, and two prompts seldom share one.
"""

from __future__ import annotations

import re
from functools import cache
from random import Random

from .task import DATA, Split

_INNERMOST = re.compile(r"\[([^\[\]]*)\]")


def expand(rng: Random, phrase: str) -> str:
    """``phrase`` with every ``[a|b]`` replaced by one of its alternatives, innermost first."""
    while found := _INNERMOST.search(phrase):
        chosen = rng.choice(found.group(1).split("|"))
        phrase = phrase[: found.start()] + chosen + phrase[found.end() :]
    return re.sub(r"  +", " ", phrase)


@cache
def read_lines(name: str) -> tuple[str, ...]:
    """The lines of ``data/<name>.txt`` that are neither empty nor comments."""
    lines = (DATA / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return tuple(line.replace("\\n", "\n") for line in lines if line.strip() and line[0] != "#")


@cache
def keyed_lines(stem: str, split: Split) -> dict[str, tuple[str, ...]]:
    """The phrases of ``data/<stem>_<split>.txt``, one ``key | phrase`` a line, by key."""
    found: dict[str, tuple[str, ...]] = {}
    for line in read_lines(f"{stem}_{split}"):
        key, _, phrase = line.partition(" | ")
        found[key] = (*found.get(key, ()), phrase)
    return found


def say(rng: Random, stem: str, split: Split, key: str, **values: object) -> str:
    """One phrase of ``key``, its alternatives chosen, its ``{slots}`` filled."""
    return expand(rng, rng.choice(keyed_lines(stem, split)[key])).format(**values)


def spoken_list(rng: Random, items: list[str]) -> str:
    """``a, b and c``, now and then with an Oxford comma or without ``and``."""
    if len(items) < 2:
        return "".join(items)
    last = rng.choice((" and ", " and ", " and ", ", and " if len(items) > 2 else " and ", ", "))
    return ", ".join(items[:-1]) + last + items[-1]


def slip(rng: Random, text: str, *, share: float) -> str:
    """With probability ``share``: no capital at the start, no full stop, or two letters swapped."""
    if rng.random() >= share:
        return text
    kind = rng.randrange(3)
    if kind == 0:
        return text[:1].lower() + text[1:]
    if kind == 1:
        return text.rstrip(".!?")
    words = list(re.finditer(r"\b[a-z]{5,}\b", text))
    if not words:
        return text
    at = (word := rng.choice(words)).start() + rng.randint(1, len(word.group()) - 3)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def pool(*words: str) -> tuple[str, ...]:
    """The words of some lines, as one tuple."""
    return tuple(" ".join(words).split())


def capital(text: str) -> str:
    """``text`` with a capital at its start, the rest untouched."""
    return text[:1].upper() + text[1:]
