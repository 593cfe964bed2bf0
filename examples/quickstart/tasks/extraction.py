"""JSON extraction to a given schema; answers are judged by type and value, key by key.

A text states some fields of a domain, some of which nobody asked for; the schema asks for some
fields, a few of which the text does not state (their value is null). Domains, values and
phrasings of the held-out split never occur in training.
"""

from __future__ import annotations

import json
import re
from random import Random
from typing import Any

from .extraction_domains import Field, Value, domains, draw_value, loose_fields, say
from .task import Example, Split, Task, user_turn

MAX_FIELDS = 5
UNSTATED_SHARE: dict[Split, float] = {"train": 0.15, "heldout": 0.08}
LOOSE_SHARE = 0.6
UNASKED_SHARE = 0.25

FRAMES: dict[Split, tuple[str, ...]] = {
    "train": (
        "Extract the data from the text as JSON. {schema}\nUse null for anything not stated.\n\n"
        "Text: {text}",
        "{text}\n\nReturn a JSON object. {schema} If a value is missing, use null.",
        "Read this message and fill in the JSON fields. {schema}\nMessage: {text}\n"
        "Missing values are null.",
        "Convert the following text to JSON.\n{schema}\n\n{text}\n\n"
        "Write null where the text says nothing.",
        "{schema}\nExtract these from: {text}\nAnswer with JSON only, null for unknown values.",
        "Here is a text: {text}\nGive me JSON. {schema} Anything not mentioned is null.",
        "Fill this in as JSON, with null where nothing is said.\n{schema}\n{text}",
        "{text}\n\nWhat are these values? {schema}\nReply in JSON; use null if absent.",
        "Make a JSON object out of this e-mail.\n{schema}\nAbsent values: null.\n\n{text}",
        "JSON extraction.\n{schema}\nInput: {text}\nOutput null if not given.",
    ),
    "heldout": (
        "Please turn the note below into structured data.\n{schema}\n"
        "Put null for whatever the note leaves out.\n---\n{text}",
        "Parse this: {text}\nI need it as one JSON object. {schema} Unknown things should be null.",
    ),
}


def json_schema(fields: list[Field]) -> dict[str, Any]:
    """JSON Schema of the answer: every key required, every value may be null."""
    properties: dict[str, Any] = {}
    for field in fields:
        properties[field.key] = {"type": field.type}
        if field.type == "array":
            properties[field.key]["items"] = {"type": "string"}
    return {"type": "object", "properties": properties, "required": [f.key for f in fields]}


def _render(rng: Random, fields: list[Field], split: Split) -> str:
    """The schema in one of the notations people use; the held-out split has its own."""
    said = {f.key: "array of strings" if f.type == "array" else f.type for f in fields}
    if split == "heldout":
        inner = ", ".join(f'"{key}": <{kind}>' for key, kind in said.items())
        return f"Follow this shape: {{{inner}}}."
    style = rng.choice(("schema", "bullets", "lines", "inline", "inline", "bracket"))
    if style == "schema":
        return f"JSON schema: {json.dumps(json_schema(fields))}"
    if style == "bullets":
        return "Fields:\n" + "\n".join(f"- {key} ({kind})" for key, kind in said.items())
    if style == "lines":
        return "\n".join(f"{key}: {kind}" for key, kind in said.items())
    if style == "bracket":
        return f"The keys are [{'; '.join(f'{key} as {kind}' for key, kind in said.items())}]."
    return f"Keys: {', '.join(f'{key} ({kind})' for key, kind in said.items())}."


def _draw_fields(rng: Random, split: Split) -> tuple[str, list[Field]]:
    """(domain, its fields); in training often a random handful of fields of no domain."""
    if split == "train" and rng.random() < LOOSE_SHARE:
        return "loose", rng.sample(loose_fields(), MAX_FIELDS + 2)
    known = domains(split)
    domain = rng.choice(list(known))
    return domain, known[domain]


def _example(rng: Random, split: Split) -> Example:
    domain, fields = _draw_fields(rng, split)
    asked = rng.sample(fields, rng.randint(2, MAX_FIELDS))
    unasked = [f for f in fields if f not in asked and rng.random() < UNASKED_SHARE]
    expected: dict[str, Value] = {}
    sentences = [say(rng, field, draw_value(rng, field, split)) for field in unasked]
    for field in asked:
        if rng.random() < UNSTATED_SHARE[split]:
            expected[field.key] = None
        else:
            expected[field.key] = draw_value(rng, field, split)
            sentences.append(say(rng, field, expected[field.key]))
    rng.shuffle(sentences)
    text = " ".join(sentences) or "There is no further information."
    prompt = rng.choice(FRAMES[split]).format(schema=_render(rng, asked, split), text=text)
    meta = {"domain": domain, "schema": json_schema(asked), "expected": expected}
    return Example(user_turn(prompt), json.dumps(expected), meta)


def generate(rng: Random, split: Split, n: int) -> list[Example]:
    """``n`` distinct texts with the object to extract."""
    found: dict[str, Example] = {}
    while len(found) < n:
        example = _example(rng, split)
        found.setdefault(example.messages[-1]["content"], example)
    return list(found.values())


def extract_json(output: str) -> Any:
    """The first JSON object in ``output``, alone, in a code fence or in prose; None if none."""
    for start in re.finditer(r"\{", output):
        try:
            return json.JSONDecoder().raw_decode(output, start.start())[0]
        except ValueError:
            continue
    return None


def _has_type(value: Any, kind: str) -> bool:
    if value is None:
        return True
    if kind in ("integer", "number"):
        numeric = int if kind == "integer" else (int, float)
        return isinstance(value, numeric) and not isinstance(value, bool)
    if kind == "array":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, bool if kind == "boolean" else str)


def fits(schema: dict[str, Any], value: Any) -> bool:
    """Whether ``value`` is an object with exactly the schema's keys and types (or null)."""
    properties = schema["properties"]
    return (
        isinstance(value, dict)
        and value.keys() == properties.keys()
        and all(_has_type(value[key], spec["type"]) for key, spec in properties.items())
    )


def verify(example: Example, output: str) -> bool:
    """Whether the first JSON object in ``output`` fits the schema and states the text's values."""
    found = extract_json(output)
    return fits(example.meta["schema"], found) and bool(found == example.meta["expected"])


TASK = Task(
    name="json",
    summary="JSON extraction to a given schema",
    generate=generate,
    verify=verify,
    max_new_tokens=112,
    train_steps=130,
)
