"""What a failed call says about the state store: pure classification of redis-py's errors."""

from __future__ import annotations

from enum import Enum

from redis.exceptions import (
    ClusterDownError,
    DataError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    ResponseError,
)

_AWAY_TYPES = (ReadOnlyError, MasterDownError, ClusterDownError)
_AWAY_CODES = frozenset({"BUSY", "NOREPLICAS"})
_REFUSED_TYPES = (OutOfMemoryError, NoPermissionError)
_REFUSED_CODES = frozenset({"MISCONF"})


class Trouble(Enum):
    """Who is at fault."""

    AWAY = "away"  # cannot be reached, or answers that it cannot serve anybody now
    REFUSED = "refused"  # answers, but will not do this: full, disk not writable, no permission
    DEFECT = "defect"  # answers that our script or command is wrong
    UNSENT = "unsent"  # our arguments could not even be encoded


def classify(error: Exception) -> Trouble:
    """``error``: a RedisError, a TimeoutError or an OSError."""
    if isinstance(error, DataError):
        return Trouble.UNSENT
    if not isinstance(error, ResponseError):
        return Trouble.AWAY
    # redis-py strips the codes that it has classes for and leaves the others in the text.
    code = str(error).partition(" ")[0]
    if isinstance(error, _REFUSED_TYPES) or code in _REFUSED_CODES:
        return Trouble.REFUSED
    if isinstance(error, _AWAY_TYPES) or code in _AWAY_CODES:
        return Trouble.AWAY
    return Trouble.DEFECT
