"""Multi-step arithmetic word problems; answers are judged by their final number.

A problem is a story of two to four steps; training mixes in bare sums. Answers stay below 200, for
the model is small. Names, things, phrasings and operands of the held-out split never occur in
training: a problem is held out when the sum of its operands is 1 modulo 4.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from random import Random

from .task import Example, Split, Task, read_phrases, user_turn

HELDOUT_RESIDUE = 1
MAX_VALUE = 200
DRILL_SHARE = 0.25

_NAMES: dict[Split, tuple[str, ...]] = {
    "train": (
        "Anna",
        "Tom",
        "Lucia",
        "Omar",
        "Mei",
        "Jack",
        "Sara",
        "Ivan",
        "Priya",
        "Leo",
        "Emma",
        "Hugo",
        "Aisha",
        "Karl",
        "Nina",
        "Peter",
        "Zoe",
        "Liam",
        "Olga",
        "Sam",
    ),
    "heldout": (
        "Nadia",
        "Ben",
        "Yuki",
        "Elena",
        "Paul",
        "Ines",
        "Marek",
        "Grace",
    ),
}
_THINGS: dict[Split, tuple[str, ...]] = {
    "train": (
        "apples",
        "marbles",
        "books",
        "stickers",
        "pencils",
        "cards",
        "shells",
        "coins",
        "oranges",
        "buttons",
        "cookies",
        "pears",
        "balls",
        "cups",
        "candles",
        "toys",
        "bottles",
        "plants",
        "ribbons",
        "stones",
        "eggs",
        "tickets",
        "photos",
    ),
    "heldout": (
        "magnets",
        "beads",
        "lemons",
        "stamps",
        "muffins",
        "tokens",
        "tulips",
    ),
}
_BOXES: dict[Split, tuple[str, ...]] = {
    "train": ("boxes", "bags", "packs", "baskets"),
    "heldout": ("crates", "jars", "trays"),
}
FRAMES: dict[Split, tuple[str, ...]] = {
    "train": (
        "{story}",
        "{story} Show your working.",
        "Solve this problem: {story}",
        "{story} Think step by step and finish with 'Answer: N'.",
        "Question: {story}",
        "Help me solve this: {story}",
        "Calculate. {story}",
        "{story} How do I work this out?",
        "My homework says: {story} What is the answer?",
        "{story} Give the working and end with 'Answer: N'.",
    ),
    "heldout": (
        "Can you help me with this one? {story}",
        "{story}\nWork it out briefly; the last line should read 'Answer: N'.",
        "Here is a maths problem. {story}",
    ),
}


PHRASES = read_phrases("arithmetic_phrases")


@dataclass
class _Story:
    """A problem in the making: the running value, what was said, and the working."""

    rng: Random
    split: Split
    name: str
    thing: str
    operands: list[int] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    working: list[str] = field(default_factory=list)

    def number(self, low: int, high: int) -> int:
        n = self.rng.randint(low, high)
        self.operands.append(n)
        return n

    def tell(self, key: str, **values: object) -> None:
        frame = self.rng.choice(PHRASES[self.split][key])
        self.said.append(frame.format(who=self.name, x=self.thing, **values))

    def box(self) -> str:
        return self.rng.choice(_BOXES[self.split])

    def work(self, left: int, operator: str, right: int) -> int:
        results = {"+": left + right, "-": left - right, "*": left * right}
        result = left // right if operator == "/" else results[operator]
        self.working.append(f"{left} {operator} {right} = {result}")
        return result


def _gain(story: _Story, total: int) -> int:
    n = story.number(2, 20)
    story.tell("gain", n=n)
    return story.work(total, "+", n)


def _lose(story: _Story, total: int) -> int:
    n = story.number(1, max(1, min(20, total - 1)))
    story.tell("lose", n=n)
    return story.work(total, "-", n)


def _gain_boxes(story: _Story, total: int) -> int:
    count, each = story.number(2, 5), story.number(2, 9)
    story.tell("gain_boxes", n=count, m=each, b=story.box())
    return story.work(total, "+", story.work(count, "*", each))


def _double(story: _Story, total: int) -> int:
    times = story.number(2, 3)
    word = {2: "doubles", 3: "triples"}[times]
    story.tell("double", w=word)
    return story.work(total, "*", times)


def _chain(story: _Story) -> int:
    total = story.number(5, 40)
    story.tell("chain", n=total)
    for _ in range(story.rng.randint(2, 3)):
        total = story.rng.choice((_gain, _lose, _lose, _gain_boxes, _double))(story, total)
    story.tell("chain_question")
    return total


def _shopping(story: _Story) -> int:
    first, price, second, cost = (story.number(*r) for r in ((2, 6), (2, 10), (2, 6), (2, 10)))
    other = story.rng.choice([t for t in _THINGS[story.split] if t != story.thing])
    story.tell("shopping", a=first, p=price, b=second, q=cost, y=other)
    total = story.work(story.work(first, "*", price), "+", story.work(second, "*", cost))
    if story.rng.random() < 0.5:
        story.tell("shopping_question")
        return total
    paid = total + story.number(1, 20)
    story.operands.append(paid)
    story.tell("shopping_change", n=paid)
    return story.work(paid, "-", total)


def _wages(story: _Story) -> int:
    hours, days, wage = story.number(2, 6), story.number(2, 5), story.number(2, 9)
    story.tell("wages", h=hours, d=days, w=wage)
    total = story.work(story.work(hours, "*", days), "*", wage)
    if story.rng.random() < 0.6:
        spent = story.number(1, min(40, total - 1))
        story.tell("wages_spent", n=spent)
        return story.work(total, "-", spent)
    story.tell("wages_question")
    return total


def _sharing(story: _Story) -> int:
    people, share, lost = story.number(2, 6), story.number(2, 9), story.number(1, 12)
    total = people * share + lost
    story.operands.append(total)
    story.tell("sharing", n=total, m=lost, k=people)
    story.tell("sharing_question")
    return story.work(story.work(total, "-", lost), "/", people)


def _comparison(story: _Story) -> int:
    base, times, fewer = story.number(2, 12), story.number(2, 4), story.number(1, 12)
    others = [n for n in _NAMES[story.split] if n != story.name]
    second, third = story.rng.sample(others, 2)
    more = story.rng.random() < 0.5 or base * times <= fewer
    story.tell(
        "comparison", n=base, k=times, m=fewer, w="more" if more else "fewer", a=second, b=third
    )
    multiplied = story.work(base, "*", times)
    last = story.work(multiplied, "+" if more else "-", fewer)
    if story.rng.random() < 0.5:
        story.tell("comparison_one", b=third)
        return last
    story.tell("comparison_all")
    return story.work(story.work(base, "+", multiplied), "+", last)


def _journey(story: _Story) -> int:
    speed, hours, slower, longer = (story.number(*r) for r in ((2, 20), (2, 5), (2, 20), (2, 5)))
    story.tell("journey", h=hours, v=speed, k=longer, w=slower)
    story.tell("journey_question")
    return story.work(story.work(speed, "*", hours), "+", story.work(slower, "*", longer))


def _boxes(story: _Story) -> int:
    count, each = story.number(2, 9), story.number(2, 10)
    lost = story.number(1, min(30, count * each - 1))
    story.tell("boxes", n=count, m=each, k=lost, b=story.box())
    story.tell("boxes_question")
    return story.work(story.work(count, "*", each), "-", lost)


def _drill(story: _Story) -> int:
    """A bare sum, for training: the numbers are harder for a small model than the stories."""
    if story.rng.random() < 0.4:
        left, right = story.number(2, 20), story.number(2, 10)
        story.tell("drill", e=f"{left} * {right}")
        return story.work(left, "*", right)
    total = story.number(5, 99)
    said = str(total)
    for _ in range(story.rng.randint(1, 2)):
        operator = story.rng.choice(("+", "-")) if total > 1 else "+"
        n = story.number(1, 40 if operator == "+" else min(40, total - 1))
        said += f" {operator} {n}"
        total = story.work(total, operator, n)
    story.tell("drill", e=said)
    return total


_KINDS: tuple[Callable[[_Story], int], ...] = (
    _chain,
    _chain,
    _shopping,
    _wages,
    _sharing,
    _comparison,
    _journey,
    _boxes,
)


def _example(rng: Random, split: Split) -> Example | None:
    drill = split == "train" and rng.random() < DRILL_SHARE
    kind = _drill if drill else rng.choice(_KINDS)
    story = _Story(rng, split, rng.choice(_NAMES[split]), rng.choice(_THINGS[split]))
    answer = kind(story)
    owned = (sum(story.operands) % 4 == HELDOUT_RESIDUE) == (split == "heldout")
    if not owned or not 0 < answer <= MAX_VALUE:
        return None
    prompt = rng.choice(FRAMES[split]).format(story=" ".join(story.said))
    target = "\n".join([*story.working, f"Answer: {answer}"])
    meta = {"kind": kind.__name__.strip("_"), "operands": story.operands, "answer": answer}
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


def final_number(output: str) -> Decimal | None:
    """The number after the last ``Answer:``, or else the last number of ``output``."""
    marked = re.findall(rf"answer\s*(?:is|:)?\W*({_NUMBER})", output, re.I)
    found = marked or re.findall(_NUMBER, output)
    return Decimal(found[-1].replace(",", "")) if found else None


def verify(example: Example, output: str) -> bool:
    """Whether the final number of ``output`` is the problem's answer."""
    return bool(final_number(output) == example.meta["answer"])


TASK = Task(
    name="math",
    summary="multi-step arithmetic word problems",
    generate=generate,
    verify=verify,
    max_new_tokens=128,
    train_steps=180,
)
