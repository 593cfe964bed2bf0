"""Every text that a chat template may write into the prompt, for counting what has to be paid for.

A template can print more than ``content``: calls and results of tools, reasoning, names, documents,
the tools themselves. What is left out here is prompt that nobody reserved, so the rule is the wide
one: all strings and keys, wherever they stand, but for the media that are no text to a template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

__all__ = ["body_texts", "is_media", "texts_within"]

_FIELDS_OF_BODY: Final = ("tools", "functions", "documents", "chat_template_kwargs")
_MEDIA = re.compile("image|audio|video|file")


def is_media(part_type: str) -> bool:
    """Whether a part of a message's content is an image, a sound or a file: bytes or an address."""
    return _MEDIA.search(part_type) is not None


def texts_within(value: Any, *, skip: Iterable[str] = ()) -> list[str]:
    """All strings inside a decoded JSON value, keys included, in no promised order.

    The keys of an outermost object are not: they are the API's. ``skip`` names those whose values
    are counted elsewhere. Without recursion, because a
    body may be nested more deeply than Python calls.
    """
    found: list[str] = []
    left: list[Any] = [value]
    if isinstance(value, dict):
        left = [inner for key, inner in value.items() if key not in skip]
    while left:
        item = left.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, dict):
            found.extend(item)
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)
    return found


def body_texts(body: Mapping[str, Any]) -> list[str]:
    """One text for each field of the body, other than its messages, that templates print."""
    return [
        " ".join(texts_within(body[name])) for name in _FIELDS_OF_BODY if body.get(name) is not None
    ]
