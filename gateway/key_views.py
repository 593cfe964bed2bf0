"""API keys as the command line and the admin API show them. Never a secret, nor its digest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gateway.keys import KeyBudgets, KeyRecord

if TYPE_CHECKING:
    from gateway.state.keys import KeyUsage

__all__ = ["key_view", "usage_view"]


def key_view(record: KeyRecord) -> dict[str, Any]:
    """What the key is and permits; money in micro-dollars, None where nothing is bounded."""
    scope = record.scope
    return {
        "id": record.id,
        "name": record.name,
        "created_ms": record.created_ms,
        "revoked_ms": record.revoked_ms,
        "policies": None if scope.policies is None else sorted(scope.policies),
        "experts": None if scope.experts is None else sorted(scope.experts),
        "limits": record.limits.by_name(),
        "budgets_micro_usd": record.budgets.by_name(),
    }


def usage_view(usage: KeyUsage) -> dict[str, Any]:
    """What the key has used, in its present windows and altogether."""
    spent = {window: getattr(usage, window) for window in KeyBudgets().by_name()}
    return {
        "spent_micro_usd": spent,
        "reserved_micro_usd": usage.reserved,
        "running_requests": usage.running,
    }
