"""Values of a row, checked; an error names the file, the row and the column."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.errors import ConfigError

__all__ = ["Row"]

_TRUTH = {"true": 1.0, "false": 0.0}


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file. ``number`` is what an editor shows: a CSV's line, a list's entry."""

    file: Path
    number: int
    values: Mapping[str, Any]

    def text(self, column: str) -> str:
        """A text that is not blank. Raises ConfigError."""
        value = self._required(column)
        if not isinstance(value, str) or not value.strip():
            raise self.error(column, "must be a text that is not empty")
        return value

    def name(self, column: str) -> str:
        """A text or a whole number, as text: an id. Raises ConfigError."""
        value = self._required(column)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self.text(column).strip()

    def score(self, column: str) -> float | None:
        """0 to 1, or a truth value; None where nothing is recorded. Raises ConfigError."""
        value = self.number_of(column, required=True)
        if value is not None and not 0.0 <= value <= 1.0:
            raise self.error(column, f"a score must be 0 to 1, not {value:g}")
        return value

    def amount(self, column: str) -> float | None:
        """A number of 0 or more; None where the column or the value is missing."""
        value = self.number_of(column)
        if value is not None and value < 0:
            raise self.error(column, f"must be 0 or more, not {value:g}")
        return value

    def number_of(self, column: str, *, required: bool = False) -> float | None:
        """A number, infinities included; None where nothing is recorded. Raises ConfigError."""
        value: Any = self._required(column) if required else self.values.get(column)
        if value is None or value == "":
            return None
        if isinstance(value, str):
            value = _TRUTH.get(value.strip().lower(), value)
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise self.error(column, f"must be a number, not {value!r:.60}") from error
        return None if math.isnan(number) else number

    def error(self, column: str, reason: str) -> ConfigError:
        return ConfigError(str(self.file), self.number, column, reason)

    def _required(self, column: str) -> Any:
        if column not in self.values:
            present = [str(name) for name in self.values]
            near = difflib.get_close_matches(column, present, n=1)
            raise ConfigError(
                str(self.file),
                self.number,
                column,
                f"the column is missing; there are: {', '.join(present[:30])}.",
                near[0] if near else None,
            )
        return self.values[column]
