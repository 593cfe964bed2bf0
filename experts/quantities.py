"""Quantities as people write them in YAML: byte sizes, parameter counts, dollars.

Each is a pydantic annotation whose validator names what it would have accepted, and whose JSON
schema an editor can complete.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema

from experts.types import MICRO_USD_PER_USD

_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KiB|MiB|GiB|TiB)")
_COUNTS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([KMBT])")
_MAX_USD = Decimal(1_000_000)
_MICRO = Decimal(1).scaleb(-6)


def _whole(number: str, unit: int) -> int:
    return int(Decimal(number) * unit)


def parse_bytes(value: Any) -> int:
    """``"512MiB"``, ``"1.5GiB"`` or a whole number of bytes, as bytes. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"expected a size such as 512MiB or 4GiB, got {value!r}")
    return _whole(match[1], _BYTES[match[2]])


def parse_count(value: Any) -> int:
    """``"135M"``, ``"7B"`` or a whole number, as a count. Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = _COUNT.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"expected a count such as 135M or 7B, got {value!r}")
    return _whole(match[1], _COUNTS[match[2]])


def parse_usd(value: Any) -> Decimal:
    """A dollar amount of at most six decimal places, exact. Raises ValueError.

    A float is read by its shortest decimal form, which is what the file said.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        raise ValueError(f"expected an amount in USD such as 0.15, got {value!r}")
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        raise ValueError(f"expected an amount in USD such as 0.15, got {value!r}") from None
    if not amount.is_finite() or amount < 0 or amount > _MAX_USD:
        raise ValueError(f"expected an amount between 0 and {_MAX_USD} USD, got {value}")
    if amount != amount.quantize(_MICRO):
        raise ValueError(f"expected at most six decimal places, got {value}")
    return amount


def micro_usd(amount: Decimal) -> int:
    """Dollars as whole micro-dollars; a finer fraction is cut off, never rounded up."""
    return int(amount * MICRO_USD_PER_USD)


SizeBytes = Annotated[
    int,
    BeforeValidator(parse_bytes),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": f"^{_SIZE.pattern}$"},
            ]
        }
    ),
]
ParameterCount = Annotated[
    int,
    BeforeValidator(parse_count),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": f"^{_COUNT.pattern}$"},
            ]
        }
    ),
]
Usd = Annotated[
    Decimal,
    BeforeValidator(parse_usd),
    WithJsonSchema({"type": "number", "minimum": 0, "maximum": int(_MAX_USD)}),
]
