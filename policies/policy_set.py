"""The policies in force: what files and the shared store say, joined, with canaries. Pure.

For each name the store's version, if one is active there, stands before the file's. A canary is a
second version that a stated share of sessions gets; which ones follows from a hash, so a session
keeps its version on every worker and every gateway.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from experts.errors import ConfigError, UnknownModel
from policies.loader import parse_policy
from policies.types import Policy

__all__ = ["STORE_PREFIX", "Canary", "Override", "PolicySet", "joined", "takes_canary"]

STORE_PREFIX = "store:"  # stands before a name where errors are listed by file


@dataclass(frozen=True, slots=True)
class Canary:
    """A version on trial. ``share`` of sessions get it, above 0 and at most 1."""

    policy: Policy
    share: float


@dataclass(frozen=True, slots=True)
class Override:
    """What the store says of one policy. ``text`` None: the file's version is in force."""

    text: str | None = None
    canary_text: str | None = None
    canary_share: float = 0.0


@dataclass(frozen=True, slots=True)
class PolicySet:
    """The policies in force. ``default`` is the one that ``model: auto`` means.

    ``from_store``: the names whose version comes from the store.
    """

    policies: Mapping[str, Policy]
    default: str
    canaries: Mapping[str, Canary] = field(default_factory=dict)
    from_store: frozenset[str] = frozenset()

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.policies)

    @property
    def digests(self) -> dict[str, str]:
        return {name: policy.digest for name, policy in self.policies.items()}

    @property
    def default_policy(self) -> Policy:
        return self.policies[self.default]

    def get(self, name: str) -> Policy:
        """The stable version. Raises UnknownModel with the names there are."""
        policy = self.policies.get(name)
        if policy is None:
            raise UnknownModel(model=name, available=self.names)
        return policy

    def choose(self, name: str, session: str) -> Policy:
        """The version that this session gets. Raises UnknownModel as ``get`` does."""
        stable = self.get(name)
        canary = self.canaries.get(name)
        if canary is None or not takes_canary(canary.policy.digest, session, canary.share):
            return stable
        return canary.policy

    def __contains__(self, name: object) -> bool:
        return name in self.policies

    def __len__(self) -> int:
        return len(self.policies)


def takes_canary(digest: str, session: str, share: float) -> bool:
    """Whether this session is among the ``share`` that gets the version with this digest.

    The same for every caller that knows the same three. Another version draws other sessions, so
    that no session is always the first to meet what is new.
    """
    drawn = hashlib.sha256(f"{digest}\0{session}".encode()).digest()[:8]
    return int.from_bytes(drawn) < share * 2**64


def joined(
    files: Mapping[str, Policy],
    overrides: Mapping[str, Override],
    before: PolicySet,
    catalogue_ids: Collection[str] | None,
) -> tuple[PolicySet, dict[str, ConfigError]]:
    """The set to put in force, and what is wrong with versions in the store.

    A wrong version there changes nothing: what was in force under its name stays, or the file's.
    """
    policies, canaries = dict(files), dict[str, Canary]()
    errors: dict[str, ConfigError] = {}
    for name, override in overrides.items():
        if override.text is not None:
            try:
                policies[name] = _parsed(name, override.text, catalogue_ids)
            except ConfigError as error:
                errors[STORE_PREFIX + name] = error
                if name in before:
                    policies[name] = before.get(name)
        if override.canary_text is not None and name in policies:
            try:
                trial = _parsed(name, override.canary_text, catalogue_ids)
            except ConfigError as error:
                errors[f"{STORE_PREFIX}{name} (canary)"] = error
            else:
                canaries[name] = Canary(trial, override.canary_share)
    stored = frozenset(n for n, o in overrides.items() if o.text is not None and n in policies)
    ordered = MappingProxyType(dict(sorted(policies.items())))
    return PolicySet(ordered, before.default, MappingProxyType(canaries), stored), errors


def _parsed(name: str, text: str, catalogue_ids: Collection[str] | None) -> Policy:
    return parse_policy(text, name=name, file=STORE_PREFIX + name, catalogue_ids=catalogue_ids)
