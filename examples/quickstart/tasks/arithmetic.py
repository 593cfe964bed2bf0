"""Multi-step arithmetic word problems; answers are judged by their final number.

A problem is either a frame with its own sum (``data/math_problems_*.txt``) or a story of events
that befall one heap of things (``data/math_events_*.txt``). The target works it out in steps of one
small operation each. Frames, names, things and operands of the held-out split never occur in
training: a problem is held out when the sum of its operands is 1 modulo 4.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from random import Random

from bench.composition.verify_number import number_is

from . import phrasing
from .phrasing import expand, read_lines
from .task import Example, Split, Task, user_turn

STEM = "math_events"
HELDOUT_RESIDUE = 1
MAX_VALUE = 999
EVENTS_SHARE = 0.3
WORDED_SHARE = 0.12

_POOLS: dict[Split, dict[str, str]] = {
    "train": {
        "she": "Anna Lucia Mei Sara Priya Emma Aisha Nina Zoe Olga Maria Julia Laura Kate Ruth "
        "Lisa",
        "he": "Tom Omar Jack Ivan Leo Hugo Karl Peter Liam Sam John David Mark Erik Noah Mike Bob",
        "x": "apples marbles books stickers pencils cards shells coins oranges buttons cookies "
        "pears balls cups candles toys bottles plants ribbons stones eggs photos pens "
        "candies cakes flowers notebooks balloons sweets bananas chairs plates",
        "box": "boxes bags packs baskets packets sacks shelves",
    },
    "heldout": {
        "she": "Nadia Yuki Elena Ines Grace Stella",
        "he": "Ben Paul Marek Bruno Tariq",
        "x": "magnets beads lemons stamps muffins tokens tulips",
        "box": "crates jars trays",
    },
}
_PRONOUNS = {
    "she": {"he": "she", "He": "She", "him": "her", "his": "her", "His": "Her"},
    "he": {"he": "he", "He": "He", "him": "him", "his": "his", "His": "His"},
}
_WORDS = phrasing.pool(
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen",
    "seventeen eighteen nineteen twenty",
)


@dataclass(frozen=True)
class Frame:
    """One problem: its wording, the range of every operand, and the sum step by step."""

    story: str
    ranges: dict[str, tuple[int, int]]
    steps: tuple[tuple[str, str, str, str], ...]
    """(result, left, operator, right), each side a name or a number."""


@dataclass(frozen=True)
class Problem:
    """``working`` holds true equations, the last of which ends in ``answer``."""

    kind: str
    prompt: str
    operands: tuple[int, ...]
    working: tuple[str, ...]
    answer: int


class _NoSum(Exception):
    """These operands give a negative number, a fraction or too large a result."""


@cache
def frames(split: Split) -> tuple[Frame, ...]:
    """The frames of a split."""
    found = []
    for line in read_lines(f"math_problems_{split}"):
        story, ranges, steps = (part.strip() for part in line.split("##"))
        spans = {}
        for item in ranges.split():
            name, _, span = item.partition("=")
            low, high = span.split("..")
            spans[name] = (int(low), int(high))
        parsed = re.findall(r"(\w)=(\w+)([-+*/])(\w+)", steps)
        found.append(Frame(story, spans, tuple((a, b, c, d) for a, b, c, d in parsed)))
    return tuple(found)


def work(left: int, operator: str, right: int) -> tuple[list[str], int]:
    """(equations, result) of one operation; a product of two long numbers goes by tens and ones."""
    if operator == "*" and left > 10 and right > 10 and left % 10 and right % 10:
        long, short = max(left, right), min(left, right)
        tens, ones = short // 10 * 10, short % 10
        parts = (long * tens, long * ones)
        lines = [f"{long} * {tens} = {parts[0]}", f"{long} * {ones} = {parts[1]}"]
        return [*lines, f"{parts[0]} + {parts[1]} = {left * right}"], left * right
    if operator == "*" and min(left, right) < 10 < max(left, right) and max(left, right) % 10:
        long, short = max(left, right), min(left, right)
        tens, ones = long // 10 * 10, long % 10
        if long > 12:
            lines = [f"{tens} * {short} = {tens * short}", f"{ones} * {short} = {ones * short}"]
            return [*lines, f"{tens * short} + {ones * short} = {left * right}"], left * right
    if operator == "/" and left % right:
        raise _NoSum
    results = {"+": left + right, "-": left - right, "*": left * right}
    result = left // right if operator == "/" else results[operator]
    if result <= 0:
        raise _NoSum
    return [f"{left} {operator} {right} = {result}"], result


def _cast(rng: Random, split: Split) -> dict[str, str]:
    """The words that fill a frame: a person with pronouns, others, things, containers."""
    pools = {key: words.split() for key, words in _POOLS[split].items()}
    gender = rng.choice(("she", "he"))
    who = rng.choice(pools[gender])
    second, third = rng.sample([n for n in pools["she"] + pools["he"] if n != who], 2)
    x, y = rng.sample(pools["x"], 2)
    others = {"who2": second, "who3": third, "x": x, "y": y, "box": rng.choice(pools["box"])}
    return {"who": who, **others, **_PRONOUNS[gender], "xx": rng.choice(("", "", f" {x}"))}


def _shown(rng: Random, n: int) -> str:
    worded = 2 <= n <= 20 and rng.random() < WORDED_SHARE
    return _WORDS[n - 2] if worded else str(n)


def _framed(rng: Random, split: Split) -> Problem:
    number, frame = rng.choice(list(enumerate(frames(split))))
    values = {name: rng.randint(*span) for name, span in frame.ranges.items()}
    operands, working, result = tuple(values.values()), [], 0
    for name, left, operator, right in frame.steps:
        a, b = (values[s] if s in values else int(s) for s in (left, right))
        lines, result = work(a, operator, b)
        working += lines
        values[name] = result
    # No words for numbers that stand behind a currency or before a sign.
    plain = re.search(r"\$|%|\*|\d", frame.story) is not None
    shown = {k: str(v) if plain else _shown(rng, v) for k, v in values.items()}
    story = expand(rng, frame.story).format(**_cast(rng, split), **shown)
    return Problem(f"frame-{number}", phrasing.capital(story), operands, tuple(working), result)


@dataclass
class _Heap:
    """A heap of things: what was told of it, and how many there are."""

    rng: Random
    split: Split
    cast: dict[str, str]
    total: int
    operands: list[int]
    said: list[str]
    working: list[str]

    def tell(self, key: str, **numbers: int) -> None:
        shown = {k: _shown(self.rng, n) for k, n in numbers.items()}
        said = phrasing.say(self.rng, STEM, self.split, key, **self.cast, **shown)
        self.said.append(phrasing.capital(said))
        self.operands += numbers.values()

    def change(self, operator: str, n: int) -> None:
        lines, self.total = work(self.total, operator, n)
        self.working += lines


def _befall(heap: _Heap) -> None:
    """One event: more, fewer, boxes of them, twice as many, half as many."""
    rng = heap.rng
    event = rng.choice(("gain", "gain", "lose", "lose", "lose", "boxes", "double", "half"))
    if event == "gain":
        n = rng.randint(2, 40)
        heap.tell("gain", n=n)
        heap.change("+", n)
    elif event == "lose":
        n = rng.randint(2, min(40, max(2, heap.total - 1)))
        heap.tell("lose", n=n)
        heap.change("-", n)
    elif event == "boxes":
        n, m = rng.randint(2, 6), rng.randint(2, 10)
        heap.tell("boxes", n=n, m=m)
        lines, more = work(n, "*", m)
        heap.working += lines
        heap.change("+", more)
    else:
        heap.tell(event)
        heap.change("*" if event == "double" else "/", 2)


def _story(rng: Random, split: Split) -> Problem:
    heap = _Heap(rng, split, _cast(rng, split), rng.randint(6, 60), [], [], [])
    heap.tell("start", n=heap.total)
    for _ in range(rng.choice((1, 2, 2, 3))):
        _befall(heap)
    heap.tell("question")
    prompt = " ".join(heap.said)
    return Problem("story", prompt, tuple(heap.operands), tuple(heap.working), heap.total)


def _example(rng: Random, split: Split) -> Example | None:
    try:
        problem = (_story if rng.random() < EVENTS_SHARE else _framed)(rng, split)
    except _NoSum:
        return None
    owned = (sum(problem.operands) % 4 == HELDOUT_RESIDUE) == (split == "heldout")
    if not owned or problem.answer > MAX_VALUE:
        return None
    prompt = phrasing.say(rng, STEM, split, "frame", p="{p}").replace("{p}", problem.prompt)
    prompt = phrasing.slip(rng, prompt, share=0.08)
    target = "\n".join([*problem.working, f"Answer: {problem.answer}"])
    meta = {"kind": problem.kind, "operands": list(problem.operands), "answer": problem.answer}
    return Example(user_turn(prompt), target, meta)


def generate(rng: Random, split: Split, n: int) -> list[Example]:
    """``n`` distinct problems with their working."""
    found: dict[str, Example] = {}
    while len(found) < n:
        example = _example(rng, split)
        if example is not None:
            found.setdefault(example.messages[-1]["content"], example)
    return list(found.values())


_NUMBER = r"-?\d[\d,]*(?:\.\d+)?"


def verify(example: Example, output: str) -> bool:
    """Whether ``output`` ends with the problem's answer."""
    return number_is(output, example.meta["answer"])


TASK = Task(
    name="math",
    summary="multi-step arithmetic word problems",
    generate=generate,
    verify=verify,
    max_new_tokens=128,
    train_steps=1000,
)
