"""Multi-step arithmetic word problems; answers are judged by their final number.

A problem is a story of two to four steps. Names, things, phrasings and operands of the held-out
split never occur in training: a problem is held out when the sum of its operands is 1 modulo 4.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from random import Random

from .task import Example, Split, Task, user_turn

HELDOUT_RESIDUE = 1
MAX_VALUE = 2_000

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

    def tell(self, train: tuple[str, ...], heldout: tuple[str, ...], **values: object) -> None:
        frame = self.rng.choice(train if self.split == "train" else heldout)
        self.said.append(frame.format(who=self.name, x=self.thing, **values))

    def box(self) -> str:
        return self.rng.choice(_BOXES[self.split])

    def work(self, left: int, operator: str, right: int) -> int:
        results = {"+": left + right, "-": left - right, "*": left * right}
        result = left // right if operator == "/" else results[operator]
        self.working.append(f"{left} {operator} {right} = {result}")
        return result


def _gain(story: _Story, total: int) -> int:
    n = story.number(3, 90)
    story.tell(
        (
            "{who} buys {n} more {x}.",
            "A friend gives {who} {n} {x}.",
            "Then {who} gets another {n} {x}.",
            "{who} finds {n} more.",
            "{n} more {x} arrive.",
            "{who} picks up {n} {x} on the way home.",
            "Grandma sends {who} {n} {x}.",
            "That evening {who} wins {n} more {x}.",
            "{who} adds {n} {x} to the collection.",
        ),
        ("Later {who} receives {n} extra {x}.", "Next, {n} further {x} are added."),
        n=n,
    )
    return story.work(total, "+", n)


def _lose(story: _Story, total: int) -> int:
    n = story.number(2, max(2, min(90, total - 1)))
    story.tell(
        (
            "{who} gives away {n} {x}.",
            "{who} loses {n} of them.",
            "{who} sells {n} {x}.",
            "Then {n} {x} are used.",
            "{n} of the {x} break.",
            "{who} gives {n} {x} to a sister.",
            "A dog runs off with {n} {x}.",
            "{who} throws out {n} {x}.",
            "On Monday {who} lends {n} {x} to a friend.",
            "{n} {x} are taken to school.",
        ),
        ("After that, {n} {x} go missing.", "{who} hands {n} {x} to a neighbour."),
        n=n,
    )
    return story.work(total, "-", n)


def _gain_boxes(story: _Story, total: int) -> int:
    count, each = story.number(2, 9), story.number(3, 12)
    story.tell(
        (
            "{who} buys {n} {b} with {m} {x} in each.",
            "{who} gets {n} {b} of {m} {x}.",
            "{who} orders {n} {b}; every one contains {m} {x}.",
            "Then {n} {b} with {m} {x} each are brought in.",
            "Someone leaves {n} {b} at the door, {m} {x} in every one.",
        ),
        ("A shop delivers {n} {b}, each holding {m} {x}.",),
        n=count,
        m=each,
        b=story.box(),
    )
    return story.work(total, "+", story.work(count, "*", each))


def _double(story: _Story, total: int) -> int:
    times = story.number(2, 4)
    word = {2: "doubles", 3: "triples", 4: "quadruples"}[times]
    story.tell(
        (
            "Then {who} {w} the number of {x}.",
            "After a week the number of {x} {w}.",
            "Over the summer the pile {w}.",
            "The count of {x} then {w}.",
        ),
        ("By spring the amount of {x} {w}.",),
        w=word,
    )
    return story.work(total, "*", times)


def _chain(story: _Story) -> int:
    total = story.number(8, 95)
    story.tell(
        (
            "{who} has {n} {x}.",
            "{who} starts with {n} {x}.",
            "{who} owns {n} {x}.",
            "There are {n} {x} in the drawer of {who}.",
            "On Sunday {who} counts {n} {x}.",
            "{who} collected {n} {x} last year.",
            "Once {who} had {n} {x}.",
        ),
        ("At first {who} keeps {n} {x}.", "{who} begins the day with {n} {x}."),
        n=total,
    )
    for _ in range(story.rng.randint(2, 3)):
        total = story.rng.choice((_gain, _lose, _lose, _gain_boxes, _double))(story, total)
    story.tell(
        (
            "How many {x} does {who} have now?",
            "How many {x} are left?",
            "How many {x} is that?",
            "What is the final number of {x}?",
            "Find out how many {x} {who} has at last.",
            "How many {x} are there now?",
        ),
        ("What is the number of {x} in the end?", "With how many {x} does {who} end up?"),
    )
    return total


def _shopping(story: _Story) -> int:
    first, price, second, cost = (story.number(*r) for r in ((2, 9), (2, 25), (2, 9), (2, 25)))
    other = story.rng.choice([t for t in _THINGS[story.split] if t != story.thing])
    story.tell(
        (
            "{who} buys {a} {x} at ${p} each and {b} {y} at ${q} each.",
            "{who} pays for {a} {x} that cost ${p} each and {b} {y} that cost ${q} each.",
            "One of the {x} costs ${p} and one of the {y} costs ${q}. {who} wants {a} {x} and {b} {y}.",
            "{who} orders {a} {x} for ${p} each, and also {b} {y} for ${q} each.",
            "In a shop {who} picks {a} {x} (${p} each) and {b} {y} (${q} each).",
            "{a} {x} at ${p} each and {b} {y} at ${q} each are in the basket of {who}.",
        ),
        ("A purchase by {who}: {a} {x}, priced ${p} apiece, plus {b} {y}, priced ${q} apiece.",),
        a=first,
        p=price,
        b=second,
        q=cost,
        y=other,
    )
    total = story.work(story.work(first, "*", price), "+", story.work(second, "*", cost))
    if story.rng.random() < 0.5:
        story.tell(
            (
                "How much does {who} pay?",
                "What is the total cost?",
                "How many dollars is that?",
                "What is the bill?",
            ),
            ("What does everything come to?",),
        )
        return total
    paid = total + story.number(1, 60)
    story.operands.append(paid)
    story.tell(
        (
            "{who} pays with ${n}. How much change is due?",
            "{who} had ${n}. How much is left?",
            "How much of ${n} is left after that?",
            "{who} hands over ${n}. What is the change?",
        ),
        ("Out of a purse with ${n}, how many dollars remain?",),
        n=paid,
    )
    return story.work(paid, "-", total)


def _wages(story: _Story) -> int:
    hours, days, wage = story.number(2, 9), story.number(2, 12), story.number(5, 19)
    story.tell(
        (
            "{who} works {h} hours a day for {d} days and earns ${w} per hour.",
            "For {d} days {who} works {h} hours each day at ${w} an hour.",
            "{who} is paid ${w} per hour and works {h} hours on each of {d} days.",
            "An hour of work brings {who} ${w}. {who} works {d} days, {h} hours every day.",
            "During {d} days of {h} hours each, {who} makes ${w} an hour.",
        ),
        ("{who} has a job that pays ${w} hourly, {h} hours daily, over {d} days.",),
        h=hours,
        d=days,
        w=wage,
    )
    total = story.work(story.work(hours, "*", days), "*", wage)
    if story.rng.random() < 0.6:
        spent = story.number(5, max(5, min(300, total - 1)))
        story.tell(
            (
                "{who} spends ${n} of it. How much money is left?",
                "After paying ${n} for rent, how much is left?",
                "{who} then buys a coat for ${n}. How many dollars are left?",
            ),
            ("An amount of ${n} goes on food. What remains of the money?",),
            n=spent,
        )
        return story.work(total, "-", spent)
    story.tell(
        (
            "How much does {who} earn?",
            "How many dollars does {who} make?",
            "What are the earnings?",
        ),
        ("What is the whole pay?",),
    )
    return total


def _sharing(story: _Story) -> int:
    people, share, lost = story.number(2, 9), story.number(2, 30), story.number(1, 40)
    total = people * share + lost
    story.operands.append(total)
    story.tell(
        (
            "{who} has {n} {x}. {m} are broken. The rest is shared equally by {k} children.",
            "There are {n} {x}. {who} keeps {m} and divides the others equally among {k} friends.",
            "{who} owns {n} {x}, loses {m}, and gives the same number of the others to each of {k} cousins.",
            "From {n} {x} {m} are taken away. {who} packs the others into {k} equal bags.",
            "{k} children share the {x} of {who} equally. There were {n}, but {m} got lost first.",
            "{who} bakes or buys {n} {x}, uses {m}, and deals out the rest equally to {k} guests.",
        ),
        ("Of {n} {x}, {who} puts {m} aside and splits what remains evenly between {k} people.",),
        n=total,
        m=lost,
        k=people,
    )
    story.tell(
        (
            "How many {x} does each one get?",
            "How many {x} does each receive?",
            "How many {x} are in one share?",
            "How many is that for each?",
        ),
        ("What is the share of one person?",),
    )
    return story.work(story.work(total, "-", lost), "/", people)


def _comparison(story: _Story) -> int:
    base, times, fewer = story.number(4, 40), story.number(2, 5), story.number(1, 30)
    others = [n for n in _NAMES[story.split] if n != story.name]
    second, third = story.rng.sample(others, 2)
    more = story.rng.random() < 0.5 or base * times <= fewer
    story.tell(
        (
            "{who} has {n} {x}. {a} has {k} times as many as {who}. {b} has {m} {w} {x} than {a}.",
            "{a} has {k} times as many {x} as {who}, who has {n}. {b} has {m} {w} than {a}.",
            "{who} owns {n} {x}, and {a} owns {k} times as many. {b} owns {m} {w} than {a}.",
            "{who} found {n} {x}. {a} found {k} times this number. {b} found {m} {w} {x} than {a} did.",
            "There are {n} {x} with {who}. With {a} there are {k} times as many, and {b} has {m} {w} than {a}.",
        ),
        ("{who} collected {n} {x}; {a} collected {k} times that; {b} collected {m} {w} than {a}.",),
        n=base,
        k=times,
        m=fewer,
        w="more" if more else "fewer",
        a=second,
        b=third,
    )
    multiplied = story.work(base, "*", times)
    last = story.work(multiplied, "+" if more else "-", fewer)
    if story.rng.random() < 0.5:
        story.tell(
            (
                "How many {x} does {b} have?",
                "How many are with {b}?",
                "What number of {x} belongs to {b}?",
            ),
            ("What is the count for {b}?",),
            b=third,
        )
        return last
    story.tell(
        (
            "How many {x} do they have together?",
            "How many {x} are there in total?",
            "What is the sum for the three of them?",
        ),
        ("What do all three have combined?",),
    )
    return story.work(story.work(base, "+", multiplied), "+", last)


def _journey(story: _Story) -> int:
    speed, hours, slower, longer = (story.number(*r) for r in ((20, 90), (2, 6), (10, 60), (2, 6)))
    story.tell(
        (
            "{who} drives {h} hours at {v} km per hour and then {k} hours at {w} km per hour.",
            "A trip takes {who} {h} hours at {v} km/h, then {k} hours at {w} km/h.",
            "{who} cycles for {h} hours at {v} km per hour. After a rest {who} goes on for {k} hours at {w} km per hour.",
            "First {who} travels {h} hours with {v} km per hour, later {k} hours with {w} km per hour.",
            "A train with {who} on board runs {h} hours at {v} km/h and {k} hours at {w} km/h.",
        ),
        ("At {v} km/h {who} rides for {h} hours, followed by {k} hours at {w} km/h.",),
        h=hours,
        v=speed,
        k=longer,
        w=slower,
    )
    story.tell(
        (
            "How many kilometres is that in total?",
            "How far does {who} go?",
            "How long is the whole way in km?",
            "How many km does {who} travel?",
        ),
        ("What distance is covered?",),
    )
    return story.work(story.work(speed, "*", hours), "+", story.work(slower, "*", longer))


def _boxes(story: _Story) -> int:
    count, each = story.number(3, 12), story.number(4, 25)
    lost = story.number(2, max(2, min(60, count * each - 1)))
    story.tell(
        (
            "{who} has {n} {b} with {m} {x} in each. {who} sells {k} {x}.",
            "There are {m} {x} in each of {n} {b}. {who} takes out {k}.",
            "Each of {n} {b} holds {m} {x}. {who} uses {k} of the {x}.",
            "{who} packs {m} {x} into each of {n} {b} and then gives away {k} {x}.",
            "On a shelf stand {n} {b}, {m} {x} in every one. {who} buys {k} {x}.",
        ),
        ("{who} fills {n} {b} with {m} {x} apiece, after which {k} {x} are eaten or lost.",),
        n=count,
        m=each,
        k=lost,
        b=story.box(),
    )
    story.tell(
        ("How many {x} are left?", "How many {x} remain?", "How many {x} are still there?"),
        ("What number of {x} stays?",),
    )
    return story.work(story.work(count, "*", each), "-", lost)


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
    kind = rng.choice(_KINDS)
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
    train_steps=110,
)
