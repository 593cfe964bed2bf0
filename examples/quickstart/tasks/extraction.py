"""JSON extraction to given keys; answers are judged by type and value, key by key.

A text states facts, some of which nobody asked for; the request names the keys, sometimes with
types, and sometimes a few that the text does not state (their value is null). Domains, values and
phrasings of the held-out split never occur in training.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

from bench.composition.verify_json import json_is

from . import phrasing
from .json_text import Fact, domains, draw_text
from .json_values import Value, type_name
from .task import Example, Split, Task, user_turn

STEM = "json_phrases"
MAX_KEYS = 5
NULL_RULE_SHARE = 0.22
UNSTATED_SHARE = 0.5
MAX_PROMPT_CHARS = 420


def json_schema(fields: dict[str, str]) -> dict[str, Any]:
    """JSON Schema of the answer: every key required, every value may be null."""
    properties: dict[str, Any] = {}
    for key, kind in fields.items():
        properties[key] = {"type": kind}
        if kind == "array":
            properties[key]["items"] = {"type": "string"}
    return {"type": "object", "properties": properties, "required": list(fields)}


def _spelled(rng: Random, key: str) -> str:
    """Now and then camelCase or words in place of snake_case, as callers have it."""
    if "_" not in key or rng.random() < 0.7:
        return key
    first, *rest = key.split("_")
    return rng.choice((first + "".join(w.capitalize() for w in rest), key, key.replace("_", "")))


def _listed(rng: Random, fields: dict[str, str]) -> str:
    """The keys in one of the notations that people use."""
    keys, style = list(fields), rng.random()
    if style < 0.3:
        return ", ".join(keys)
    if style < 0.55:
        return " and ".join(keys) if len(keys) < 3 else f"{', '.join(keys[:-1])} and {keys[-1]}"
    if style < 0.68:
        return ", ".join(f'"{key}"' for key in keys)
    if style < 0.76:
        return ", ".join(f"`{key}`" for key in keys)
    if style < 0.88:
        return ", ".join(f"{key} ({kind})" for key, kind in fields.items())
    if style < 0.94:
        return "{" + ", ".join(f'"{key}": {kind}' for key, kind in fields.items()) + "}"
    return "[" + ", ".join(keys) + "]"


def _with_unstated(rng: Random, split: Split, asked: list[Fact]) -> dict[str, str]:
    """The asked keys and, behind or among them, a key or two that the text leaves out."""
    stated = {f.key: f.type for f in asked}
    others = {
        key: type_name(a.spec)
        for domain in rng.sample(domains(split), min(3, len(domains(split))))
        for a in domain.attributes
        for key in a.keys
    }
    meanings = {key.split("_")[0] for key in stated}
    free = [k for k in others if k not in stated and k.split("_")[0] not in meanings]
    unrelated = [k for k in free if others[k] not in ("string",) or k in ("email", "phone", "vet")]
    extra = rng.sample(unrelated, min(len(unrelated), rng.choice((1, 1, 2))))
    fields = [*stated.items(), *((k, others[k]) for k in extra)]
    rng.shuffle(fields)
    return dict(fields)


def _request(rng: Random, split: Split, text: str, fields: dict[str, str], rule: bool) -> str:
    noun = phrasing.say(rng, STEM, split, "noun")
    null = phrasing.say(rng, STEM, split, "null", n=noun) if rule else ""
    ask = phrasing.say(rng, STEM, split, "ask", k=_listed(rng, fields), n=noun, w=null)
    ask = phrasing.slip(rng, ask, share=0.12)
    shape = phrasing.say(rng, STEM, split, "shape", ask="{ask}", bare="{bare}", text="{text}")
    bare = ask.rstrip(".?")
    return shape.replace("{ask}", ask).replace("{bare}", bare).replace("{text}", text)


def _example(rng: Random, split: Split) -> Example | None:
    text, facts = draw_text(rng, split)
    asked = rng.sample(facts, min(len(facts), rng.randint(1, MAX_KEYS)))
    if len(asked) < 2 and rng.random() < 0.8:
        return None
    if rng.random() < 0.6:  # people mostly ask in the order of the text
        asked.sort(key=facts.index)
    asked = [Fact(_spelled(rng, f.key), f.type, f.drawn) for f in asked]
    stated: dict[str, Value] = {f.key: f.drawn.value for f in asked}
    fields, rule = {f.key: f.type for f in asked}, rng.random() < NULL_RULE_SHARE
    if rule and rng.random() < UNSTATED_SHARE and len(facts) == len(asked):
        fields = _with_unstated(rng, split, asked)
    expected = {key: stated.get(key) for key in fields}
    prompt = _request(rng, split, text, fields, rule)
    if len(stated) != len(asked) or len(prompt) > MAX_PROMPT_CHARS:
        return None
    meta = {"schema": json_schema(fields), "expected": expected}
    return Example(user_turn(prompt), json.dumps(expected, ensure_ascii=False), meta)


def generate(rng: Random, split: Split, n: int) -> list[Example]:
    """``n`` distinct texts with the object to extract."""
    found: dict[str, Example] = {}
    while len(found) < n:
        example = _example(rng, split)
        if example is not None:
            found.setdefault(example.messages[-1]["content"], example)
    return list(found.values())


def verify(example: Example, output: str) -> bool:
    """Whether the first JSON object in ``output`` fits the schema and states the text's values."""
    return json_is(output, example.meta["expected"], example.meta["schema"])


TASK = Task(
    name="json",
    summary="JSON extraction to given keys",
    generate=generate,
    verify=verify,
    max_new_tokens=110,
    train_steps=460,
)
