"""Why ``coe serve`` gave up."""

from __future__ import annotations

__all__ = ["StartFailed"]


class StartFailed(Exception):
    """Something that a person has to put right; the text says what and how."""
