"""Conversions of units, times and dates; an answer is judged by what it says, not how.

Every kind of conversion draws its values, works the answer out in short steps, and is asked in one
of the phrasings of ``data/convert_phrases_<split>.txt``. Phrasings and values of the held-out split
never occur in training: a number, a day or a minute n belongs to it when n is 1 modulo 4.
"""

from __future__ import annotations

import calendar
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from functools import cache
from random import Random

from bench.composition.verify_measure import MONTHS, states

from . import phrasing
from .phrasing import keyed_lines, read_lines
from .task import Example, Split, Task, user_turn

WEEKDAYS = tuple(calendar.day_name)
STEM = "convert_phrases"
HELDOUT_RESIDUE = 1
CONTEXT_SHARE = 0.35

_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("Anna", "Tom", "Lucia", "Omar", "Mei", "Jack", "Sara", "Leo", "Emma", "Peter"),
    "heldout": ("Nadia", "Ben", "Elena", "Paul"),
}
_CITIES: dict[Split, tuple[str, ...]] = {
    "train": ("London", "Tokyo", "Paris", "New York", "Delhi", "Sydney", "Cairo", "Berlin", "Lima"),
    "heldout": ("Vienna", "Lisbon", "Boston", "Kyoto", "Dublin"),
}


@dataclass(frozen=True)
class Asked:
    """A conversion: the key of its phrasings, what fills them, the working, and the answer."""

    key: str
    values: dict[str, object]
    working: tuple[str, ...]
    answer: str


@dataclass(frozen=True)
class _Draw:
    rng: Random
    split: Split

    def number(self, low: int, high: int) -> int:
        """An integer that belongs to this split."""
        while True:
            n = self.rng.randint(low, high)
            if (n % 4 == HELDOUT_RESIDUE) == (self.split == "heldout"):
                return n

    def clock(self) -> int:
        """Minutes since midnight, on a five-minute mark or a round hour more often than not."""
        hour = self.number(0, 23)
        minute = self.rng.choice((0, 0, 30, 15, 45, 5 * self.rng.randint(0, 11), 0))
        return hour * 60 + (minute if self.rng.random() < 0.8 else self.rng.randint(0, 59))

    def day(self, low: int = 1, high: int = 28) -> date:
        return date(self.rng.randint(1990, 2030), self.rng.randint(1, 12), self.number(low, high))

    def shown_day(self, day: date) -> str:
        """A date as somebody would write it, with the year."""
        name = MONTHS[day.month - 1]
        forms = (
            f"{day.day} {name} {day.year}",
            f"{name} {day.day}, {day.year}",
            day.isoformat(),
            f"{day.day}{_ordinal(day.day)} {name} {day.year}",
        )
        return self.rng.choice(
            forms if self.rng.random() < 0.85 else (f"{day.day} {name[:3]} {day.year}",)
        )

    def shown_time(self, minutes: int, *, twelve: bool) -> str:
        if not twelve:
            return time_24(minutes)
        said = time_12(minutes)
        if minutes % 60 == 0 and self.rng.random() < 0.4:
            said = said.replace(":00", "")
        return self.rng.choice((said, said.lower(), said.lower().replace(" ", "")))


def time_24(minutes: int) -> str:
    """Minutes since midnight as ``HH:MM``."""
    return f"{minutes // 60 % 24:02}:{minutes % 60:02}"


def time_12(minutes: int) -> str:
    """Minutes since midnight as ``H:MM AM``."""
    hour = minutes // 60 % 24
    return f"{hour % 12 or 12}:{minutes % 60:02} {'AM' if hour < 12 else 'PM'}"


def long_date(day: date) -> str:
    """``3 March 2024``."""
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def _ordinal(n: int) -> str:
    return {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th") if n not in (11, 12, 13) else "th"


def _plain(n: Decimal) -> str:
    """``2.50`` as ``2.5``, ``1E+3`` as ``1000``."""
    text = f"{n:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


@cache
def _units() -> tuple[tuple[str, tuple[str, ...], tuple[str, ...], int], ...]:
    """(dimension, words for the larger unit, words for the smaller, how many make one)."""
    found = []
    for line in read_lines("convert_units"):
        dimension, big, small, factor = line.split(" | ")
        found.append((dimension, tuple(big.split()), tuple(small.split()), int(factor)))
    return tuple(found)


@cache
def _rates() -> tuple[tuple[str, str, tuple[str, ...], Decimal], ...]:
    found = []
    for line in read_lines("convert_rates"):
        names, into, rate = line.split(" | ")
        one, many = names.split()
        # Two-word units stand alone; otherwise each word is another name of the same unit.
        words = (into,) if into.startswith(("square", "cubic")) else tuple(into.split())
        found.append((one, many, words, Decimal(rate)))
    return tuple(found)


def _named(rng: Random, names: tuple[str, ...], amount: Decimal) -> str:
    """``1 metre``, ``5 km``, ``2.5 kg``: the amount with one of the unit's names."""
    plural = [n for n in names[1:] if len(n) < 4 or n.endswith("s") or n == "feet"]
    name = names[0] if amount == 1 else rng.choice(plural)
    return f"{_plain(amount)}{'' if len(name) < 3 and rng.random() < 0.25 else ' '}{name}"


def _plural_name(rng: Random, names: tuple[str, ...]) -> str:
    return rng.choice([n for n in names[1:] if n.endswith("s") or n == "feet" or len(n) < 4])


def _amount(draw: _Draw, factor: int, down: bool) -> Decimal:
    """An amount whose conversion has at most a few digits."""
    rng = draw.rng
    if down:  # larger unit to smaller: whole, or halves and tenths where the factor is decimal
        n = Decimal(draw.number(1, 60 if factor >= 100 else 40))
        if factor % 10 == 0 and rng.random() < 0.4:
            n = Decimal(draw.number(11, 95)) / 10
        elif factor in (60, 24) and rng.random() < 0.2:
            return Decimal(draw.number(2, 12)) + Decimal("0.5")
        return n
    if factor in (1000, 100, 10) and rng.random() < 0.5:
        return Decimal(draw.number(2, 95)) * factor / 10
    return Decimal(draw.number(2, 30)) * factor


def _product(n: Decimal, rate: Decimal) -> tuple[str, ...]:
    """The steps of a product: by tens and ones when a long number meets a long one."""
    result = n * rate
    whole = n == n.to_integral_value() and rate == rate.to_integral_value()
    power_of_ten = rate in (10, 100, 1000)
    if whole and not power_of_ten and n > 12 and n % 10 and rate % 10 and rate > 1:
        tens, ones = n // 10 * 10, n % 10
        first, second = tens * rate, ones * rate
        return (
            f"{_plain(tens)} * {_plain(rate)} = {_plain(first)}",
            f"{_plain(ones)} * {_plain(rate)} = {_plain(second)}",
            f"{_plain(first)} + {_plain(second)} = {_plain(result)}",
        )
    return (f"{_plain(n)} * {_plain(rate)} = {_plain(result)}",)


def _unit(draw: _Draw) -> Asked:
    rng = draw.rng
    dimension, big, small, factor = rng.choice(_units())
    down = rng.random() < 0.6
    n = _amount(draw, factor, down)
    source, into = (big, small) if down else (small, big)
    asked = _plural_name(rng, into)
    if down:
        result = n * factor
        working = _product(n, Decimal(factor))
    else:
        result = n / factor
        working = (f"{_plain(n)} / {factor} = {_plain(result)}",)
    contextual = dimension in keyed_lines(STEM, draw.split) and rng.random() < CONTEXT_SHARE
    said: dict[str, object] = {"a": _named(rng, source, n), "u": asked}
    answer = f"{_plain(result)} {asked}"
    return Asked(dimension if contextual else "unit", said, working, answer)


def _rate(draw: _Draw) -> Asked:
    one, many, words, rate = draw.rng.choice(_rates())
    n = Decimal(draw.number(2, 40 if rate < 20 else 12))
    if rate < 2 and draw.rng.random() < 0.4:
        n = Decimal(draw.number(2, 30) * 10)
    into = draw.rng.choice(words)
    said: dict[str, object] = {"a": f"{_plain(n)} {many}", "u": into, "one": one, "r": rate}
    return Asked("rate", said, _product(n, rate), f"{_plain(n * rate)} {into}")


def _split(draw: _Draw) -> Asked:
    n = draw.number(62, 590)
    hours, minutes = divmod(n, 60)
    working = (f"{hours} * 60 = {hours * 60}", f"{n} - {hours * 60} = {minutes}")
    return Asked("split", {"n": n}, working, f"{hours} h {minutes} min")


def _join(draw: _Draw) -> Asked:
    hours, minutes = draw.rng.randint(1, 9), draw.number(2, 58)
    working = (f"{hours} * 60 = {hours * 60}", f"{hours * 60} + {minutes} = {hours * 60 + minutes}")
    return Asked("join", {"h": hours, "m": minutes}, working, f"{hours * 60 + minutes} minutes")


def _to12(draw: _Draw) -> Asked:
    t = draw.clock()
    hour = t // 60
    working = (f"{hour} - 12 = {hour - 12}",) if hour > 12 else ()
    return Asked("to12", {"t": time_24(t)}, working, time_12(t))


def _to24(draw: _Draw) -> Asked:
    t = draw.clock()
    hour = t // 60
    working = (f"{hour - 12} + 12 = {hour}",) if hour > 12 else ()
    return Asked("to24", {"t": draw.shown_time(t, twelve=True)}, working, time_24(t))


def _iso(draw: _Draw) -> Asked:
    day, rng = draw.day(), draw.rng
    name = MONTHS[day.month - 1]
    working = (f"{name} = {day.month:02}",)
    forms = (
        f"{day.day} {name} {day.year}",
        f"{name} {day.day}, {day.year}",
        f"{day.day}{_ordinal(day.day)} {name} {day.year}",
        f"{day.day}{_ordinal(day.day)} of {name} {day.year}",
        f"{name} {day.day}{_ordinal(day.day)}, {day.year}",
        f"{day.day} {name[:3]} {day.year}",
        f"{name[:3]} {day.day}, {day.year}",
        f"{name} {day.day} {day.year}",
    )
    if rng.random() < 0.25:
        sign = rng.choice("/.-")
        shown = rng.choice(
            (
                f"{day.day:02}{sign}{day.month:02}{sign}{day.year} (DD{sign}MM{sign}YYYY)",
                f"{day.month:02}{sign}{day.day:02}{sign}{day.year} (MM{sign}DD{sign}YYYY)",
                f"{day.day:02}.{day.month:02}.{day.year}",
            )
        )
        return Asked("iso", {"d": shown}, (), day.isoformat())
    return Asked("iso", {"d": rng.choice(forms)}, working, day.isoformat())


def _long(draw: _Draw) -> Asked:
    day = draw.day()
    if draw.rng.random() < 0.3:
        return Asked("slash", {"i": day.isoformat()}, (), f"{day:%d/%m/%Y}")
    working = (f"{day.month:02} = {MONTHS[day.month - 1]}",)
    return Asked("long", {"i": day.isoformat()}, working, long_date(day))


def _month_steps(day: date, moved: int) -> tuple[str, ...]:
    """Forward by days: past the month's end, its length comes off."""
    total = day.day + moved
    lines = [f"{day.day} + {moved} = {total}"]
    month, year = day.month, day.year
    while total > (length := (date(year + month // 12, month % 12 + 1, 1) - timedelta(1)).day):
        lines.append(
            f"{MONTHS[month - 1]} has {length} days: {total} - {length} = {total - length}"
        )
        total -= length
        month, year = month % 12 + 1, year + month // 12
    return (*lines, f"{total} {MONTHS[month - 1]} {year}")


def _written(day: date, like: str) -> str:
    """The answer in the notation of the question: ISO for ISO, words for words."""
    return day.isoformat() if like[:4].isdigit() else long_date(day)


def _adddays(draw: _Draw) -> Asked:
    day, rng = draw.day(), draw.rng
    shown = draw.shown_day(day)
    weeks = rng.random() < 0.25
    n = rng.randint(2, 5) * 7 if weeks else rng.randint(2, 30)
    lines = _month_steps(day, n)
    later = _written(day + timedelta(n), shown)
    if weeks:
        steps = (f"{n // 7} * 7 = {n}", *lines)
        return Asked("addweeks", {"d": shown, "w": n // 7}, steps, later)
    return Asked("adddays", {"d": shown, "n": n}, lines, later)


def _subdays(draw: _Draw) -> Asked:
    day, n = draw.day(), draw.rng.randint(2, 25)
    shown, earlier = draw.shown_day(day), day - timedelta(n)
    if n < day.day:
        lines: tuple[str, ...] = (f"{day.day} - {n} = {day.day - n}",)
    else:
        length = (date(day.year, day.month, 1) - timedelta(1)).day
        left = n - day.day
        lines = (
            f"{n} - {day.day} = {left}",
            f"{MONTHS[earlier.month - 1]} has {length} days: {length} - {left} = {length - left}",
        )
    lines = (*lines, long_date(earlier))
    return Asked("subdays", {"d": shown, "n": n}, lines, _written(earlier, shown))


def _between(draw: _Draw) -> Asked:
    rng, day = draw.rng, draw.day()
    later = day + timedelta(rng.randint(2, 40))
    year = rng.random() < 0.5
    a, b = (f"{d.day} {MONTHS[d.month - 1]}{f' {d.year}' if year else ''}" for d in (day, later))
    days = (later - day).days
    if day.month == later.month:
        lines: tuple[str, ...] = (f"{later.day} - {day.day} = {days}",)
    else:
        end = date(day.year + day.month // 12, day.month % 12 + 1, 1) - timedelta(1)
        rest = end.day - day.day
        head = f"{MONTHS[day.month - 1]} has {end.day} days: {end.day} - {day.day} = {rest}"
        if later.month != day.month % 12 + 1:
            return _between(draw)
        lines = (head, f"{rest} + {later.day} = {days}")
    if day.month == 2 and day.year % 4 == 0 and not year:
        return _between(draw)  # without the year nobody knows how long that February is
    return Asked("between", {"d": a, "e": b}, lines, f"{days} days")


def _weekday(draw: _Draw) -> Asked:
    start, n = draw.rng.randrange(7), draw.number(2, 30)
    weeks, rest = divmod(n, 7)
    lines = [f"{n} - {weeks * 7} = {rest}"] if weeks else []
    names = [WEEKDAYS[(start + k) % 7] for k in range(rest + 1)]
    lines.append(" > ".join(names))
    return Asked("weekday", {"k": WEEKDAYS[start], "n": n}, tuple(lines), names[-1])


def _clock_steps(t: int, hours: int, minutes: int) -> tuple[str, ...]:
    """Hours first, then minutes; past 60 minutes an hour comes on, past 24 hours a day off."""
    hour, minute = divmod(t, 60)
    lines = [f"{hour} + {hours} = {hour + hours}"] if hours else []
    hour += hours
    if minutes:
        lines.append(f"{minute} + {minutes} = {minute + minutes}")
        minute += minutes
    while minute >= 60:
        lines.append(f"{minute} - 60 = {minute - 60}, {hour} + 1 = {hour + 1}")
        hour, minute = hour + 1, minute - 60
    if hour >= 24:
        lines.append(f"{hour} - 24 = {hour - 24}")
    return tuple(lines)


def _clock_sum(draw: _Draw, key: str, t: int, hours: int, minutes: int, **said: object) -> Asked:
    """A time moved forward, answered on the clock that the question uses."""
    twelve = draw.rng.random() < 0.3
    later, lines = t + hours * 60 + minutes, _clock_steps(t, hours, minutes)
    shown, answer = draw.shown_time(t, twelve=twelve), time_24(later)
    if twelve:
        answer = time_12(later)
        lines = (time_24(t), *lines, time_24(later))
    return Asked(key, {"t": shown, **said}, lines, answer)


def _addtime(draw: _Draw) -> Asked:
    hours, minutes = draw.rng.randint(1, 6), 5 * draw.rng.randint(1, 11)
    return _clock_sum(draw, "addtime", draw.clock(), hours, minutes, h=hours, m=minutes)


def _addmin(draw: _Draw) -> Asked:
    n = draw.rng.choice((5 * draw.rng.randint(1, 18), draw.rng.randint(2, 59)))
    return _clock_sum(draw, "addmin", draw.clock(), 0, n, n=n)


def _zone(draw: _Draw) -> Asked:
    here, there = draw.rng.sample(_CITIES[draw.split], 2)
    n = draw.rng.randint(1, 11)
    said = {"c": here, "c2": there, "n": n, "s": "" if n == 1 else "s"}
    if draw.rng.random() < 0.55:
        return _clock_sum(draw, "zone", draw.clock(), n, 0, **said)
    t = draw.clock()
    hour = t // 60
    lines = (
        [f"{hour} - {n} = {hour - n}"] if hour >= n else [f"{hour} + 24 - {n} = {hour + 24 - n}"]
    )
    return Asked("zoneback", {"t": time_24(t), **said}, tuple(lines), time_24(t - n * 60 + 1440))


def _submin(draw: _Draw) -> Asked:
    t, n = draw.clock(), 5 * draw.rng.randint(1, 11)
    hour, minute = divmod(t, 60)
    if hour == 0:
        return _submin(draw)
    if minute >= n:
        lines: tuple[str, ...] = (f"{minute} - {n} = {minute - n}",)
    else:
        lines = (f"{minute} + 60 - {n} = {minute + 60 - n}, {hour} - 1 = {hour - 1}",)
    return Asked("submin", {"t": time_24(t), "n": n}, lines, time_24(t - n))


def _span(draw: _Draw) -> Asked:
    t = draw.clock() % (20 * 60)
    n = 5 * draw.rng.randint(2, 40)
    end = t + n
    hours, minutes = end // 60 - t // 60, end % 60 - t % 60
    if hours == 0:
        lines: tuple[str, ...] = (f"{end % 60} - {t % 60} = {n}",)
    else:
        lines = (
            f"{end // 60} - {t // 60} = {hours}, {hours} * 60 = {hours * 60}",
            f"{hours * 60} + {end % 60} = {hours * 60 + end % 60}",
            f"{hours * 60 + end % 60} - {t % 60} = {n}",
        )
    if minutes == 0 and hours:
        lines = lines[:1]
    twelve = draw.rng.random() < 0.15
    shown = [draw.shown_time(x, twelve=twelve) for x in (t, end)]
    if twelve:
        lines = (f"{time_24(t)} {time_24(end)}", *lines)
    return Asked("span", {"t": shown[0], "v": shown[1]}, lines, f"{n} minutes")


def _temperature(draw: _Draw) -> Asked:
    celsius = 5 * draw.number(0, 24)
    scaled = celsius * 9 // 5
    if draw.rng.random() < 0.65:
        lines = (
            f"{celsius} / 5 = {celsius // 5}",
            f"{celsius // 5} * 9 = {scaled}",
            f"{scaled} + 32 = {scaled + 32}",
        )
        return Asked("fahrenheit", {"n": celsius}, lines, f"{scaled + 32} °F")
    lines = (
        f"{scaled + 32} - 32 = {scaled}",
        f"{scaled} / 9 = {celsius // 5}",
        f"{celsius // 5} * 5 = {celsius}",
    )
    return Asked("celsius", {"n": scaled + 32}, lines, f"{celsius} °C")


_KINDS: tuple[tuple[Callable[[_Draw], Asked], int], ...] = (
    (_unit, 10),
    (_rate, 5),
    (_split, 2),
    (_join, 2),
    (_to12, 3),
    (_to24, 3),
    (_iso, 5),
    (_long, 3),
    (_adddays, 5),
    (_subdays, 2),
    (_between, 2),
    (_weekday, 3),
    (_addtime, 4),
    (_addmin, 2),
    (_submin, 2),
    (_zone, 3),
    (_span, 2),
    (_temperature, 3),
)


def _example(rng: Random, split: Split) -> Example:
    (kind,) = rng.choices([k for k, _ in _KINDS], weights=[w for _, w in _KINDS])
    asked = kind(_Draw(rng, split))
    question = phrasing.say(
        rng, STEM, split, asked.key, who=rng.choice(_NAMES[split]), **asked.values
    )
    prompt = phrasing.say(rng, STEM, split, "frame", q="{q}").replace("{q}", question)
    prompt = phrasing.slip(rng, prompt, share=0.06)
    target = "\n".join([*asked.working, f"Answer: {asked.answer}"])
    return Example(user_turn(prompt), target, {"kind": asked.key, "answer": asked.answer})


def generate(rng: Random, split: Split, n: int) -> list[Example]:
    """``n`` distinct conversions with their working."""
    found: dict[str, Example] = {}
    while len(found) < n:
        example = _example(rng, split)
        found.setdefault(example.messages[-1]["content"], example)
    return list(found.values())


def verify(example: Example, output: str) -> bool:
    """Whether ``output`` states the answer, in any usual notation of the same kind."""
    return states(output, [example.meta["answer"]])


TASK = Task(
    name="convert",
    summary="conversion of units, times and dates",
    generate=generate,
    verify=verify,
    max_new_tokens=112,
    train_steps=800,
)
