"""Questions over a drawn schema, each with its reference query.

A kind of question draws the columns, thresholds and the wording of one query. Wordings come from
``data/sql_phrases_<split>.txt``; some columns have idioms (``older than``, ``made of``) of their
own in ``data/sql_natural_<split>.txt``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from . import phrasing
from .phrasing import keyed_lines
from .sql_schema import Column, Table, draw_threshold
from .task import Split

STEM = "sql_phrases"
NATURAL = "sql_natural"
NATURAL_SHARE = 0.6
AGGREGATES = ("AVG", "AVG", "SUM", "SUM", "MAX", "MIN")


@dataclass(frozen=True)
class Query:
    question: str
    sql: str


@dataclass(frozen=True)
class Condition:
    """``phrase`` follows the noun, ``adjective`` (if any) precedes it instead."""

    phrase: str
    sql: str
    column: str
    adjective: str = ""


@dataclass(frozen=True)
class Draw:
    """The random choices of one question."""

    rng: Random
    split: Split
    tables: tuple[Table, ...]

    @property
    def main(self) -> Table:
        return self.tables[0]

    @property
    def parent(self) -> Table:
        return self.tables[1]

    def say(self, key: str, **values: object) -> str:
        return phrasing.say(self.rng, STEM, self.split, key, **values)

    def text(self, table: Table) -> Column:
        return self.rng.choice(table.of_kind("text"))

    def number(self, table: Table) -> Column:
        return self.rng.choice(table.of_kind("number"))


def words(name: str) -> str:
    return name.replace("_", " ")


def _said(draw: Draw, column: Column) -> str:
    """``product_name`` is mostly said "product name", often just "name"."""
    short = column.name.endswith("_name") and draw.rng.random() < 0.4
    return "name" if short else words(column.name)


def _plural(word: str) -> str:
    if word.endswith("s"):
        return word
    return word[:-1] + "ies" if word.endswith("y") and word[-2:-1] not in "aeou" else word + "s"


def _listed(draw: Draw, columns: list[Column]) -> str:
    said = [_said(draw, c) for c in columns]
    if draw.rng.random() < 0.35:
        said = [_plural(s) if c.kind == "text" else s for s, c in zip(said, columns, strict=True)]
    return phrasing.spoken_list(draw.rng, said)


def _natural(draw: Draw, column: Column, operator: str) -> str | None:
    """An idiom of this column for this comparison, where there is one and chance wants it."""
    idioms = keyed_lines(NATURAL, draw.split).get(f"{column.name} {operator}")
    if idioms is None or draw.rng.random() >= NATURAL_SHARE:
        return None
    return draw.rng.choice(idioms[0].split(" ; "))


def _text_condition(draw: Draw, name: str, column: Column) -> Condition:
    rng = draw.rng
    v, u = rng.sample(column.values, 2)
    operator = rng.choice(("=",) * 9 + ("!=", "in", "like"))
    if operator == "like":
        v = v[0]
    key = {"=": "text", "!=": "ne", "in": "in", "like": "like"}[operator]
    idiom = _natural(draw, column, operator)
    if idiom == "PRE":
        return Condition("", f"{name} = '{v}'", column.name, adjective=v)
    phrase = idiom.format(v=v, u=u) if idiom else draw.say(key, c=_said(draw, column), v=v, u=u)
    sql = {
        "=": f"{name} = '{v}'",
        "!=": f"{name} != '{v}'",
        "in": f"{name} IN ('{v}', '{u}')",
        "like": f"{name} LIKE '{v}%'",
    }[operator]
    return Condition(phrase, sql, column.name)


def _number_condition(draw: Draw, name: str, column: Column) -> Condition:
    low = draw_threshold(draw.rng, column, draw.split)
    said = _said(draw, column)
    if draw.rng.random() < 0.1:
        low, high = sorted((low, draw_threshold(draw.rng, column, draw.split)))
        phrase = draw.say("between", c=said, n=low, m=high)
        return Condition(phrase, f"{name} BETWEEN {low} AND {high}", column.name)
    small = column.high - column.low < 100 and draw.rng.random() < 0.12
    operator = "=" if small else draw.rng.choice((">", ">", "<", "<", ">=", "<="))
    idiom = _natural(draw, column, operator)
    phrase = idiom.format(n=low) if idiom else draw.say(operator, c=said, n=low)
    return Condition(phrase, f"{name} {operator} {low}", column.name)


def condition(draw: Draw, table: Table, *, qualified: bool = False, without: str = "") -> Condition:
    """One comparison on a column other than ``without``."""
    columns = [c for c in table.data_columns if c.name != without]
    column = draw.rng.choice(columns)
    name = f"{table.name}.{column.name}" if qualified else column.name
    return (_text_condition if column.kind == "text" else _number_condition)(draw, name, column)


def _after(phrase: str) -> str:
    return f" {phrase}" if phrase else ""


def _where(draw: Draw, table: Table, *, qualified: bool = False) -> tuple[str, str, str]:
    """(noun with an adjective, phrases behind it, WHERE clause) of zero to three conditions."""
    count = draw.rng.choice((0, 0, 1, 1, 1, 1, 2, 2, 3)) if not qualified else 1
    noun = words(table.name)
    if count == 0:
        return noun, "", ""
    first = condition(draw, table, qualified=qualified)
    noun = f"{first.adjective} {noun}" if first.adjective else noun
    if count == 1:
        return noun, _after(first.phrase), f" WHERE {first.sql}"
    second = condition(draw, table, without=first.column)
    while second.adjective:
        second = condition(draw, table, without=first.column)
    if count == 2:
        word = draw.rng.choice(("and", "and", "or")) if first.phrase else "and"
        said = f"{_after(first.phrase)} {word if first.phrase else ''} {second.phrase}"
        return noun, said, f" WHERE {first.sql} {word.upper()} {second.sql}"
    third = condition(draw, table, without=second.column)
    while third.adjective:
        third = condition(draw, table, without=second.column)
    glue = " and" if first.phrase else ""
    either = draw.rng.choice((f"either {second.phrase} or", f"{second.phrase} or"))
    said = f"{_after(first.phrase)}{glue} {either} {third.phrase}"
    if not first.phrase:
        said = f" {either} {third.phrase}"
    return noun, said, f" WHERE {first.sql} AND ({second.sql} OR {third.sql})"


def _aggregate(draw: Draw, column: Column) -> tuple[str, str]:
    function = draw.rng.choice(AGGREGATES)
    return draw.say(function, c=_said(draw, column)), function


def _select(draw: Draw) -> Query:
    table = draw.main
    count = min(len(table.data_columns), draw.rng.choice((1, 1, 1, 2, 2, 3)))
    picked = draw.rng.sample(table.data_columns, count)
    noun, said, where = _where(draw, table)
    question = draw.say("select", cols=_listed(draw, picked), t=noun, w=said)
    return Query(question, f"SELECT {', '.join(c.name for c in picked)} FROM {table.name}{where}")


def _everything(draw: Draw) -> Query:
    noun, said, where = _where(draw, draw.main)
    return Query(draw.say("everything", t=noun, w=said), f"SELECT * FROM {draw.main.name}{where}")


def _count(draw: Draw) -> Query:
    noun, said, where = _where(draw, draw.main)
    return Query(draw.say("count", t=noun, w=said), f"SELECT COUNT(*) FROM {draw.main.name}{where}")


def _aggregate_one(draw: Draw) -> Query:
    column = draw.number(draw.main)
    phrase, function = _aggregate(draw, column)
    noun, said, where = _where(draw, draw.main)
    question = draw.say("aggregate_one", a=phrase, t=noun, w=said)
    return Query(question, f"SELECT {function}({column.name}) FROM {draw.main.name}{where}")


def _extreme(draw: Draw, noun: str, column: Column, down: bool) -> str:
    """``cheapest lamps`` where the column has such a word, else ``lamps with the lowest price``."""
    idiom = _natural(draw, column, "max" if down else "min")
    if idiom:
        return f"{idiom} {noun}"
    return draw.say("best" if down else "worst", t=noun, c=_said(draw, column))


def _top(draw: Draw) -> Query:
    table, column, shown = draw.main, draw.number(draw.main), draw.text(draw.main)
    single, down = draw.rng.random() < 0.4, draw.rng.random() < 0.6
    count = 1 if single else draw.rng.choice((2, 3, 3, 5, 5, 10, 4, 6))
    extreme = _extreme(draw, words(table.singular if single else table.name), column, down)
    numbers = {2: "two", 3: "three", 5: "five", 10: "ten"}
    said = numbers.get(count, str(count)) if draw.rng.random() < 0.35 else str(count)
    head = draw.rng.choice(("", "top ", "")) if down else ""
    noun = extreme if single else f"{head}{said} {extreme}"
    question = draw.say("one" if single else "top", s=_said(draw, shown), np=noun)
    order = f"ORDER BY {column.name} {'DESC' if down else 'ASC'} LIMIT {count}"
    return Query(question, f"SELECT {shown.name} FROM {table.name} {order}")


def _superlative_first(draw: Draw, column: Column, down: bool) -> str | None:
    """``cheapest first``, in training only: the held-out questions were drawn without it."""
    if draw.split == "heldout" or draw.rng.random() < 0.5:
        return None
    idiom = _natural(draw, column, "max" if down else "min")
    return f"{idiom} first" if idiom else None


def _ordered(draw: Draw) -> Query:
    table, rng = draw.main, draw.rng
    picked = rng.sample(table.data_columns, min(len(table.data_columns), rng.choice((1, 1, 2))))
    alphabetic = picked[0].kind == "text" and rng.random() < 0.35
    by = picked[0] if alphabetic else draw.number(table)
    down = not alphabetic and rng.random() < 0.55
    key = "alpha" if alphabetic else ("desc" if down else "asc")
    noun, said, where = _where(draw, table)
    order = _superlative_first(draw, by, down) if by.kind == "number" else None
    order = order or draw.say(key, c=_said(draw, by))
    question = draw.say("ordered", cols=_listed(draw, picked), t=noun, w=said, o=order)
    columns = ", ".join(c.name for c in picked)
    way = "DESC" if down else "ASC"
    return Query(question, f"SELECT {columns} FROM {table.name}{where} ORDER BY {by.name} {way}")


def _group(draw: Draw) -> Query:
    table, by, column = draw.main, draw.text(draw.main), draw.number(draw.main)
    phrase, function = _aggregate(draw, column)
    question = draw.say("group", a=phrase, t=words(table.name), b=_said(draw, by))
    sql = f"SELECT {by.name}, {function}({column.name}) FROM {table.name} GROUP BY {by.name}"
    return Query(question, sql)


def _group_count(draw: Draw) -> Query:
    table, by = draw.main, draw.text(draw.main)
    question = draw.say("group_count", t=words(table.name), b=_said(draw, by))
    return Query(question, f"SELECT {by.name}, COUNT(*) FROM {table.name} GROUP BY {by.name}")


def _group_most(draw: Draw) -> Query:
    table, by, most = draw.main, draw.text(draw.main), draw.rng.random() < 0.7
    key, way = ("group_most", "DESC") if most else ("group_least", "ASC")
    question = draw.say(key, t=words(table.name), b=_said(draw, by))
    order = f"GROUP BY {by.name} ORDER BY COUNT(*) {way} LIMIT 1"
    return Query(question, f"SELECT {by.name} FROM {table.name} {order}")


def _having(draw: Draw) -> Query:
    table, by, least = draw.main, draw.text(draw.main), draw.rng.randint(1, 6)
    question = draw.say("having", b=_said(draw, by), n=least, t=words(table.name))
    having = f"GROUP BY {by.name} HAVING COUNT(*) > {least}"
    return Query(question, f"SELECT {by.name} FROM {table.name} {having}")


def _distinct(draw: Draw) -> Query:
    column = draw.text(draw.main)
    if draw.rng.random() < 0.3:
        said = draw.say("count_distinct", c=_said(draw, column), t=words(draw.main.name))
        return Query(said, f"SELECT COUNT(DISTINCT {column.name}) FROM {draw.main.name}")
    noun, said, where = _where(draw, draw.main)
    question = draw.say("distinct", c=_said(draw, column), t=noun, w=said)
    return Query(question, f"SELECT DISTINCT {column.name} FROM {draw.main.name}{where}")


def _beyond_average(draw: Draw) -> Query:
    table, column, shown = draw.main, draw.number(draw.main), draw.text(draw.main)
    above = draw.rng.random() < 0.6
    question = draw.say(
        "beyond_average",
        s=_said(draw, shown),
        t=words(table.name),
        c=_said(draw, column),
        x=draw.say("above" if above else "below"),
    )
    inner = f"(SELECT AVG({column.name}) FROM {table.name})"
    sign = ">" if above else "<"
    sql = f"SELECT {shown.name} FROM {table.name} WHERE {column.name} {sign} {inner}"
    return Query(question, sql)


def _joined(draw: Draw) -> str:
    child, parent = draw.main, draw.parent
    on = f"{child.name}.{child.reference} = {parent.name}.{parent.key}"
    return f"{child.name} JOIN {parent.name} ON {on}"


def _join_filter(draw: Draw) -> Query:
    child, parent = draw.main, draw.parent
    noun, said, where = _where(draw, parent, qualified=True)
    names = {"t": words(child.name), "p": noun, "w": said, "one": words(parent.singular)}
    kind = draw.rng.choice(("count", "aggregate", "filter", "filter"))
    if kind == "count":
        picked, question = "COUNT(*)", draw.say("join_count", **names)
    elif kind == "aggregate":
        phrase, function = _aggregate(draw, column := draw.number(child))
        picked = f"{function}({child.name}.{column.name})"
        question = draw.say("join_aggregate", a=phrase, **names)
    else:
        column = draw.rng.choice(child.data_columns)
        picked = f"{child.name}.{column.name}"
        question = draw.say("join_filter", c=_listed(draw, [column]), **names)
    return Query(question, f"SELECT {picked} FROM {_joined(draw)}{where}")


def _join_columns(draw: Draw) -> Query:
    child, parent = draw.main, draw.parent
    mine, theirs = draw.rng.choice(child.data_columns), draw.text(parent)
    question = draw.say(
        "join_columns",
        c=_said(draw, mine),
        t=words(child.name),
        t1=words(child.singular),
        d=_said(draw, theirs),
        one=words(parent.singular),
    )
    picked = f"{child.name}.{mine.name}, {parent.name}.{theirs.name}"
    return Query(question, f"SELECT {picked} FROM {_joined(draw)}")


def _join_group(draw: Draw) -> Query:
    child, parent, by = draw.main, draw.parent, draw.text(draw.parent)
    names = {"t": words(child.name), "one": words(parent.singular), "b": _said(draw, by)}
    if draw.rng.random() < 0.5:
        phrase, function = _aggregate(draw, column := draw.number(child))
        measured = f"{function}({child.name}.{column.name})"
        question = draw.say("join_group", a=phrase, **names)
    else:
        measured, question = "COUNT(*)", draw.say("join_count_group", **names)
    shown = f"{parent.name}.{by.name}"
    return Query(question, f"SELECT {shown}, {measured} FROM {_joined(draw)} GROUP BY {shown}")


def _join_having(draw: Draw) -> Query:
    child, parent, by = draw.main, draw.parent, draw.text(draw.parent)
    least, shown = draw.rng.randint(1, 5), f"{parent.name}.{by.name}"
    names = {"t": words(child.name), "one": words(parent.singular), "b": _said(draw, by)}
    if draw.rng.random() < 0.5:
        question = draw.say("join_having", p=words(parent.name), n=least, **names)
        rest = f"GROUP BY {shown} HAVING COUNT(*) > {least}"
    else:
        question = draw.say("join_top", **names)
        rest = f"GROUP BY {shown} ORDER BY COUNT(*) DESC LIMIT 1"
    return Query(question, f"SELECT {shown} FROM {_joined(draw)} {rest}")


def _parent_by_child(draw: Draw) -> Query:
    child, parent, shown = draw.main, draw.parent, draw.text(draw.parent)
    noun, said, where = _where(draw, child, qualified=True)
    names = {"p": words(parent.name), "one": words(parent.singular), "s": _said(draw, shown)}
    question = draw.say("parent_by_child", t=noun, w=said, **names)
    return Query(
        question, f"SELECT DISTINCT {parent.name}.{shown.name} FROM {_joined(draw)}{where}"
    )


def _join_extreme(draw: Draw) -> Query:
    child, parent, shown = draw.main, draw.parent, draw.text(draw.parent)
    column, down = draw.number(child), draw.rng.random() < 0.6
    extreme = _extreme(draw, words(child.singular), column, down)
    names = {"one": words(parent.singular), "s": _said(draw, shown), "np": extreme}
    order = f"ORDER BY {child.name}.{column.name} {'DESC' if down else 'ASC'} LIMIT 1"
    sql = f"SELECT {parent.name}.{shown.name} FROM {_joined(draw)} {order}"
    return Query(draw.say("join_extreme", **names), sql)


def _childless(draw: Draw) -> Query:
    child, parent, shown = draw.main, draw.parent, draw.text(draw.parent)
    question = draw.say(
        "childless", s=_said(draw, shown), p=words(parent.name), t=words(child.name)
    )
    inner = f"(SELECT {child.reference} FROM {child.name})"
    sql = f"SELECT {shown.name} FROM {parent.name} WHERE {parent.key} NOT IN {inner}"
    return Query(question, sql)


Kind = Callable[[Draw], Query]

SINGLE: tuple[tuple[Kind, int], ...] = (
    (_select, 7),
    (_everything, 2),
    (_count, 4),
    (_aggregate_one, 4),
    (_top, 5),
    (_ordered, 3),
    (_group, 3),
    (_group_count, 3),
    (_group_most, 2),
    (_having, 1),
    (_distinct, 2),
    (_beyond_average, 2),
)
JOINED: tuple[tuple[Kind, int], ...] = (
    (_join_filter, 6),
    (_join_columns, 2),
    (_join_group, 4),
    (_join_having, 2),
    (_parent_by_child, 2),
    (_join_extreme, 2),
    (_childless, 2),
)
