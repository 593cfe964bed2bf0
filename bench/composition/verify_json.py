"""Verifier of JSON extraction: the first object of an answer, by keys, types and values."""

from __future__ import annotations

import json
import re
from typing import Any

from jsonschema import Draft202012Validator


def extract_json(output: str) -> Any:
    """The first JSON object in ``output``, alone, in a code fence or in prose; None if none."""
    for start in re.finditer(r"\{", output):
        try:
            return json.JSONDecoder().raw_decode(output, start.start())[0]
        except ValueError:
            continue
    return None


def nullable(schema: dict[str, Any]) -> dict[str, Any]:
    """``schema`` with null allowed for every property, and no further properties."""
    properties = {
        key: {**spec, "type": [spec["type"], "null"]} for key, spec in schema["properties"].items()
    }
    return {**schema, "properties": properties, "additionalProperties": False}


def fits(schema: dict[str, Any], value: Any) -> bool:
    """Whether ``value`` satisfies the JSON Schema, each property being nullable."""
    return bool(Draft202012Validator(nullable(schema)).is_valid(value))


def _plain(value: Any) -> Any:
    """A value as people would compare it: text without case and outer blanks, 42 like "42"."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    text = re.sub(r"\s+", " ", str(value)).strip().casefold()
    number = re.fullmatch(r"-?\d+(?:\.\d+)?", text)
    return float(text) if number else text


def _identical(found: Any, wanted: Any) -> bool:
    """Equality that tells ``1`` from ``true``."""
    if isinstance(found, bool) is not isinstance(wanted, bool):
        return False
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict)
            and found.keys() == wanted.keys()
            and all(_identical(found[key], wanted[key]) for key in wanted)
        )
    if isinstance(wanted, list):
        return (
            isinstance(found, list)
            and len(found) == len(wanted)
            and all(_identical(a, b) for a, b in zip(found, wanted, strict=True))
        )
    return bool(found == wanted)


def json_is(output: str, wanted: dict[str, Any], schema: dict[str, Any] | None = None) -> bool:
    """Whether the first object in ``output`` is ``wanted``.

    With a schema, types must be its types and values equal exactly. Without one nobody said whether
    a house number is a number: then 42 and "42" are the same, and so are texts but for case.
    """
    found = extract_json(output)
    if not isinstance(found, dict):
        return False
    if schema is not None:
        return fits(schema, found) and _identical(found, wanted)
    return _identical(_plain(found), _plain(wanted))
