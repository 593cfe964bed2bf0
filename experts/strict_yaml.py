"""Strict loading of YAML files into pydantic models.

Whatever is wrong comes out as one ``ConfigError`` with file, line, dotted key, a plain reason and,
for a mistyped name, the nearest known one. Validation runs in pydantic's strict JSON mode, so that
``"16"`` is text and not a number, while lists still become tuples and sets.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from experts.errors import ConfigError
from experts.yaml_tree import MAX_FILE_BYTES, Loc, Tree, dotted, parse_tree

M = TypeVar("M", bound=BaseModel)

_SHOWN_CHARS = 60
_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "frozen_set": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}
_TYPE_ERROR = re.compile(r"(.+?)_(?:attributes_)?(?:type|parsing|from_float)")


class Section(BaseModel):
    """Base of every configuration model: no unknown keys, no changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


@dataclass(frozen=True, slots=True)
class Document(Generic[M]):
    """A loaded file that can still say on which line each of its keys stands."""

    value: M
    file: str
    _tree: Tree

    def error(self, loc: Loc, reason: str, nearest: str | None = None) -> ConfigError:
        """A ConfigError at ``loc``, or at the closest enclosing key that the file has."""
        return _error_at(self._tree, self.file, loc, reason, nearest)

    def unknown(self, loc: Loc, name: str, known: Iterable[str], what: str) -> ConfigError:
        """A ConfigError for a reference to something that does not exist."""
        names = sorted(known)
        close = nearest_name(name, names)
        reason = (
            f"there is no {what} {name!r}."
            if close
            else (f"there is no {what} {name!r}; known: {', '.join(names) or 'none'}.")
        )
        return self.error(loc, reason, close)


def load_model(path: Path, model: type[M]) -> M:
    """Load a YAML file. Raises ConfigError for everything that can be wrong with it."""
    return load_document(path, model).value


def load_text(text: str, model: type[M], *, file: str) -> M:
    """Load YAML text; ``file`` is the name that errors carry."""
    return parse_document(text, model, file=file).value


def load_document(path: Path, model: type[M]) -> Document[M]:
    """As ``load_model``, keeping the lines for checks that span several keys."""
    return parse_document(read_bounded(path), model, file=str(path))


def parse_document(text: str, model: type[M], *, file: str) -> Document[M]:
    """As ``load_text``, keeping the lines for checks that span several keys."""
    tree = parse_tree(text, file=file)
    try:
        value = model.model_validate_json(json.dumps(tree.data), strict=True)
    except ValidationError as invalid:
        found = invalid.errors(include_url=False)
        # Without "from None" the traceback would carry the input, which may hold a secret.
        raise first_of([_explain(error, tree, model, file) for error in found]) from None
    return Document(value, file, tree)


def read_bounded(path: Path) -> str:
    """The text of a UTF-8 file of at most MAX_FILE_BYTES. Raises ConfigError."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(str(path), None, "", "there is no such file") from None
    except OSError as error:
        raise ConfigError(str(path), None, "", f"cannot be read: {error.strerror}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise ConfigError(str(path), None, "", f"larger than the limit of {MAX_FILE_BYTES} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(str(path), line, "", "not valid UTF-8") from None


def first_of(errors: Sequence[ConfigError]) -> ConfigError:
    """The error highest up in the file; its reason counts the others.

    A name that is close to a known one goes before: it is likely to be the cause of a missing key.
    """
    first = min(errors, key=lambda error: (error.nearest is None, error.line or 0))
    others = len(errors) - 1
    if not others:
        return first
    noun = "problem" if others == 1 else "problems"
    return replace(first, reason=f"{first.reason} (and {others} more {noun} in this file)")


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` most likely meant, if any is close."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)), None)


# --- from pydantic's errors to ours --------------------------------------------------------------


def _explain(error: ErrorDetails, tree: Tree, model: type[BaseModel], file: str) -> ConfigError:
    loc, kind = error["loc"], error["type"]
    present = _existing(tree, loc)
    if kind == "missing":
        return _error_at(tree, file, (*present, loc[-1]), "is required", at_key=True)
    if kind == "extra_forbidden":
        known = _known_keys(model, loc[:-1])
        close = nearest_name(str(loc[-1]), known)
        reason = "unknown key." if close else f"unknown key; known: {', '.join(sorted(known))}."
        return _error_at(tree, file, loc, reason, close, at_key=True)
    if kind in {"literal_error", "enum"}:
        options = re.findall(r"'([^']*)'", str(error.get("ctx", {}).get("expected", "")))
        close = nearest_name(str(error["input"]), options)
        reason = f"expected one of {', '.join(options)}, got {_shown(error['input'])}."
        return _error_at(tree, file, present, reason, close)
    return _error_at(tree, file, present, _reason(error), at_key="[key]" in loc)


def _reason(error: ErrorDetails) -> str:
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    match = _TYPE_ERROR.fullmatch(error["type"])
    if match and match[1] in _EXPECTED:
        return f"expected {_EXPECTED[match[1]]}, got {_shown(error['input'])}"
    reason = error["msg"].replace("Input should", "must", 1)
    return f"{reason[0].lower()}{reason[1:]}, got {_shown(error['input'])}"


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 1] + "…"


def _error_at(
    tree: Tree,
    file: str,
    loc: Loc,
    reason: str,
    nearest: str | None = None,
    *,
    at_key: bool = False,
) -> ConfigError:
    """The line is that of ``loc``, or of the closest enclosing key that the file has."""
    position = tree.positions.get(_existing(tree, loc))
    line = (position.key_line if at_key else position.value_line) if position else 1
    return ConfigError(file, line, dotted(loc), reason, nearest)


def _existing(tree: Tree, loc: Loc) -> Loc:
    """``loc`` without the steps that are pydantic's own (union members) or not in the file."""
    kept: Loc = ()
    for part in loc:
        if (*kept, part) in tree.positions:
            kept = (*kept, part)
    return kept


def _known_keys(model: type[BaseModel], loc: Loc) -> tuple[str, ...]:
    """The fields of the model that stands at ``loc`` inside ``model``."""
    current: Any = model
    for part in loc:
        current = _step(current, part)
    owner = _model_in(current)
    return tuple(owner.model_fields) if owner else ()


def _step(annotation: Any, part: str | int) -> Any:
    owner = _model_in(annotation)
    if owner is not None:
        known = owner.model_fields.get(str(part))
        return known.annotation if known else None
    for option in _options(annotation):
        args = get_args(option)
        if get_origin(option) is dict:
            return args[1]
        if get_origin(option) in {list, tuple}:
            return args[0]
    return None


def _options(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) in {Union, types.UnionType}:
        return get_args(annotation)
    return (annotation,)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for option in _options(annotation):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None
