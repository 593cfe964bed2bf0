"""YAML text to plain data, with the line of every key and value.

Only the part of YAML that a configuration needs: one document of mappings with text keys, lists,
text, numbers, booleans and null. Anchors, aliases, tags and duplicate keys are refused, and size
and depth are bounded, so that a hostile or careless file can neither run code, grow in memory nor
say one thing twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from experts.errors import ConfigError

Loc = tuple[str | int, ...]

MAX_FILE_BYTES = 1 << 20
_MAX_DEPTH = 32
# libyaml where the wheel has it: the same events and marks, about ten times as fast.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_NUMBERS = {_TAG + "int", _TAG + "float"}
_TEXTS = {_TAG + "str", _TAG + "timestamp", _TAG + "value", _TAG + "merge"}


@dataclass(frozen=True, slots=True)
class Position:
    """1-based lines; a list item's key is the item itself."""

    key_line: int
    value_line: int


@dataclass(frozen=True, slots=True)
class Tree:
    """Plain data and where each part of it stands in the file."""

    data: Any
    positions: dict[Loc, Position]


def dotted(loc: Loc) -> str:
    """``("hosts", 0, "name")`` as ``hosts[0].name``."""
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def parse_tree(text: str, *, file: str) -> Tree:
    """Parse one bounded document. Raises ConfigError with the line of the first problem."""
    if len(text) > MAX_FILE_BYTES:
        raise ConfigError(file, None, "", f"larger than the limit of {MAX_FILE_BYTES} bytes")
    try:
        _refuse_dangerous_events(text, file)
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise _syntax_error(error, text, file) from None
    if root is None:
        raise ConfigError(file, None, "", "the file is empty")
    builder = _Builder(file)
    return Tree(builder.build(root, ()), builder.positions)


def _refuse_dangerous_events(text: str, file: str) -> None:
    """Checked on the flat event stream, because composing a deep document already recurses."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        mark = event.start_mark
        line = mark.line + 1 if mark else None
        if getattr(event, "anchor", None) is not None:
            raise ConfigError(file, line, "", "anchors and aliases are not accepted; write it out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                raise ConfigError(file, line, "", f"nested deeper than {_MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _syntax_error(error: yaml.YAMLError, text: str, file: str) -> ConfigError:
    line: int | None = None
    reason = "not valid YAML"
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        reason += ": " + ", ".join(part for part in (error.context, error.problem) if part)
    elif isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, int(error.position)) + 1
        reason += f": {error.reason}"
    return ConfigError(file, line, "", reason)


class _Builder:
    def __init__(self, file: str) -> None:
        self._file = file
        self.positions: dict[Loc, Position] = {}

    def build(self, node: yaml.Node, loc: Loc) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode):
            return self._sequence(node, loc)
        return self._scalar(node, loc)

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        self._expect_tag(node, loc, {_TAG + "map"})
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node, loc)
            if key in data:
                first = self.positions[(*loc, key)].key_line
                reason = f"written twice, first on line {first}"
                raise self._error(key_node, (*loc, key), reason)
            child = (*loc, key)
            self.positions[child] = Position(_line(key_node), _line(value_node))
            data[key] = self.build(value_node, child)
        return data

    def _key(self, node: yaml.Node, loc: Loc) -> str:
        if isinstance(node, yaml.ScalarNode) and node.tag in _TEXTS:
            return str(node.value)
        shown = f" {node.value!r}" if isinstance(node, yaml.ScalarNode) else ""
        raise self._error(node, loc, f"the key{shown} is not text; put it in quotes")

    def _sequence(self, node: yaml.SequenceNode, loc: Loc) -> list[Any]:
        self._expect_tag(node, loc, {_TAG + "seq"})
        data = []
        for index, item in enumerate(node.value):
            child = (*loc, index)
            self.positions[child] = Position(_line(item), _line(item))
            data.append(self.build(item, child))
        return data

    def _scalar(self, node: yaml.Node, loc: Loc) -> Any:
        if node.tag in _TEXTS:
            return node.value
        self._expect_tag(node, loc, _NUMBERS | {_TAG + "bool", _TAG + "null"})
        try:
            value = SafeConstructor().construct_object(node)
        except (ValueError, KeyError):
            raise self._error(node, loc, "not a readable number or boolean") from None
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(node, loc, "expected a finite number")
        return value

    def _expect_tag(self, node: yaml.Node, loc: Loc, tags: set[str]) -> None:
        if node.tag not in tags:
            raise self._error(node, loc, f"the tag {node.tag!r} is not accepted")

    def _error(self, node: yaml.Node, loc: Loc, reason: str) -> ConfigError:
        return ConfigError(self._file, _line(node), dotted(loc), reason)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
