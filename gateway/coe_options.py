"""The ``coe`` object of a request: bounds and wishes of the caller, checked key by key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from experts.errors import InvalidRequest
from experts.types import MICRO_USD_PER_USD
from gateway.fields import is_number, optional_boolean
from policies.types import Overrides

__all__ = ["CoeOptions", "coe_options"]

MODELS_MAX = 8
_SESSION_CHARS_MAX = 128
_LANGUAGE = re.compile(r"([A-Za-z]{2,3})(?:[-_][A-Za-z0-9]{1,8})*")
_KEYS = (
    "max_cost_usd",
    "deadline_ms",
    "policy",
    "models",
    "allow",
    "deny",
    "tags",
    "language",
    "session_id",
    "explain",
)


@dataclass(frozen=True, slots=True)
class CoeOptions:
    """``models``: experts in the order in which to try them. ``language``: ISO 639 code."""

    overrides: Overrides = field(default_factory=Overrides)
    policy: str | None = None
    models: tuple[str, ...] = ()
    allow: frozenset[str] | None = None
    deny: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()
    language: str | None = None
    session_id: str | None = None
    explain: bool = False


_NOTHING_SAID = CoeOptions()


def coe_options(coe: Any) -> CoeOptions:
    """Read the object; None gives the defaults. Raises InvalidRequest that names the key."""
    if coe is None:
        return _NOTHING_SAID
    if not isinstance(coe, dict):
        raise InvalidRequest("coe", "an object is required")
    _refuse_unknown(coe)
    allow = _names(coe, "allow")
    return CoeOptions(
        overrides=Overrides(
            max_cost_micro_usd=_micro_usd(coe), deadline_ms=_positive(coe, "deadline_ms")
        ),
        policy=_string(coe, "policy"),
        models=model_list(coe.get("models"), "coe.models"),
        allow=allow,
        deny=_names(coe, "deny") or frozenset(),
        tags=_names(coe, "tags") or frozenset(),
        language=_language(coe),
        session_id=_string(coe, "session_id", chars_max=_SESSION_CHARS_MAX),
        explain=optional_boolean(coe, "explain", "coe."),
    )


def model_list(value: Any, where: str) -> tuple[str, ...]:
    """An ordered list of experts; a repetition counts once. Raises InvalidRequest."""
    if value is None:
        return ()
    if (
        not isinstance(value, list)
        or not 0 < len(value) <= MODELS_MAX
        or not all(isinstance(item, str) and item for item in value)
    ):
        raise InvalidRequest(where, f"a list of 1 to {MODELS_MAX} expert ids is required")
    return tuple(dict.fromkeys(value))


def _refuse_unknown(coe: Mapping[str, Any]) -> None:
    for key in coe:
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.4)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(_KEYS)}."
            raise InvalidRequest(f"coe.{key}", f"unknown option. {hint}")


def _language(coe: Mapping[str, Any]) -> str | None:
    """The primary subtag of a language tag: ``de`` of ``de-AT``."""
    value = _string(coe, "language")
    if value is None:
        return None
    found = _LANGUAGE.fullmatch(value)
    if found is None:
        raise InvalidRequest("coe.language", "a language tag such as en or de-AT is required")
    return found[1].lower()


def _micro_usd(coe: Mapping[str, Any]) -> int | None:
    value = coe.get("max_cost_usd")
    if value is None:
        return None
    if not is_number(value) or value < 0:
        raise InvalidRequest("coe.max_cost_usd", "a number of at least 0 is required")
    return int(Decimal(str(value)) * MICRO_USD_PER_USD)  # rounded down: a cap is never widened


def _positive(coe: Mapping[str, Any], name: str) -> float | None:
    value = coe.get(name)
    if value is None:
        return None
    if not is_number(value) or value <= 0:
        raise InvalidRequest(f"coe.{name}", "a number above 0 is required")
    return float(value)


def _string(coe: Mapping[str, Any], name: str, chars_max: int = 256) -> str | None:
    value = coe.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= chars_max:
        raise InvalidRequest(f"coe.{name}", f"a string of 1 to {chars_max} characters is required")
    return value


def _names(coe: Mapping[str, Any], name: str) -> frozenset[str] | None:
    value = coe.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise InvalidRequest(f"coe.{name}", "a list of strings is required")
    return frozenset(value)
