"""Checks of single JSON fields that several parsers share."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, TypeGuard

from experts.errors import InvalidRequest

__all__ = ["is_int", "is_number", "optional_boolean"]


def is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A number that a float can hold: JSON's may have any number of digits."""
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )


def optional_boolean(fields: Mapping[str, Any], name: str, where: str = "") -> bool:
    """A boolean that may be missing or null. Raises InvalidRequest for anything else."""
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequest(where + name, "true or false is required")
    return bool(value)
