"""The ``--json FILE`` of commands."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gateway.ask import CommandFailed

__all__ = ["write_json"]


def write_json(result: Mapping[str, Any], target: str | None) -> None:
    """To a file, to standard output for ``-``, nowhere for None. Raises CommandFailed."""
    if target is None:
        return
    text = json.dumps(result, indent=2, sort_keys=True, default=str)
    if target == "-":
        print(text)
        return
    try:
        Path(target).write_text(text + "\n")
    except OSError as error:
        raise CommandFailed(f"{target} cannot be written: {error.strerror}.") from error
