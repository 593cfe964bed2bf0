"""The console's one page and the headers that keep it harmless.

Style and script stand in the page itself, so nothing is loaded from anywhere. The content security
policy permits exactly these two, by their digests, and no inline handler, form target or frame.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

__all__ = ["ConsolePage", "console_page"]


@dataclass(frozen=True, slots=True)
class ConsolePage:
    html: bytes
    headers: Mapping[str, str]


def console_page() -> ConsolePage:
    """The shipped page."""
    text = files("gateway.console").joinpath("index.html").read_text(encoding="utf-8")
    policy = "; ".join(
        [
            "default-src 'none'",
            f"script-src {_digest_of(text, 'script')}",
            f"style-src {_digest_of(text, 'style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }
    return ConsolePage(text.encode(), headers)


def _digest_of(text: str, element: str) -> str:
    """CSP 3, section 2.3.1: the digest of what stands between the tags, to the byte."""
    found = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    if len(found) != 1:
        raise ValueError(f"the page has {len(found)} <{element}> elements, not one")
    digest = hashlib.sha256(found[0].encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
