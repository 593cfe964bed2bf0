"""One line of news per starting host, in the store, for whoever waits for it.

``deployments.registry.publish_progress`` writes it, ``gateway.supervisor`` shows it.
"""

from __future__ import annotations


def progress_key(host_name: str) -> str:
    """A text that expires by itself."""
    return f"coe:host-progress:{host_name}"
