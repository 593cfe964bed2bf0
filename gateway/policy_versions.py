"""What the shared store knows of one policy, and how each order changes it. Pure.

A record holds the versions that were put into the store, which of them is active (none: the file's
version is), a canary if one runs, and what was active before, so that it can be had back. Every
change raises the revision by one; who writes back must hold the revision it has read.
"""

from __future__ import annotations

import re

import msgspec

from experts.catalogue import ID_PATTERN
from experts.errors import InvalidRequest
from policies.policy_set import Override

__all__ = [
    "HISTORY_MAX",
    "TEXT_BYTES_MAX",
    "VERSIONS_MAX",
    "PolicyRecord",
    "Version",
    "activated",
    "check_name",
    "etag",
    "override_of",
    "released",
    "revision_of",
    "rolled_back",
    "with_canary",
    "without_canary",
]

VERSIONS_MAX = 20
HISTORY_MAX = 20
TEXT_BYTES_MAX = 64 * 1024


class Version(msgspec.Struct, frozen=True):
    """A policy file's text, under the digest of what it decides. ``at_ms``: since the epoch."""

    digest: str
    text: str
    at_ms: int


class Step(msgspec.Struct, frozen=True):
    """What was active until ``until_ms``; ``digest`` None: the file's version."""

    digest: str | None
    until_ms: int


class PolicyRecord(msgspec.Struct, frozen=True):
    """See the module. ``canary_share`` is the share of sessions, 0 without a canary."""

    name: str
    revision: int = 0
    active: str | None = None
    canary: str | None = None
    canary_share: float = 0.0
    versions: tuple[Version, ...] = ()
    history: tuple[Step, ...] = ()

    def version(self, digest: str) -> Version:
        """Raises InvalidRequest with the digests there are."""
        for version in self.versions:
            if version.digest == digest:
                return version
        known = ", ".join(v.digest for v in self.versions) or "none"
        raise InvalidRequest("digest", f"no version {digest!r} of {self.name!r}; kept are {known}")


def check_name(name: str) -> str:
    """Raises InvalidRequest for what cannot be a policy's name."""
    if not re.fullmatch(ID_PATTERN, name):
        raise InvalidRequest("name", f"{name[:80]!r} does not match {ID_PATTERN}")
    return name


# --- orders --------------------------------------------------------------------------------------


def activated(record: PolicyRecord, version: Version, now_ms: int) -> PolicyRecord:
    """This version for everybody; a running canary ends. The one in force goes into the history.

    Activating what is active already changes nothing but that.
    """
    history = record.history
    if record.active != version.digest:
        history = (*history, Step(record.active, now_ms))
    return _next(
        record,
        active=version.digest,
        canary=None,
        canary_share=0.0,
        versions=_with(record.versions, version),
        history=history,
    )


def released(record: PolicyRecord, now_ms: int) -> PolicyRecord:
    """Back to the file's version, wherever a gateway has one."""
    history = record.history
    if record.active is not None:
        history = (*history, Step(record.active, now_ms))
    return _next(record, active=None, canary=None, canary_share=0.0, history=history)


def rolled_back(record: PolicyRecord) -> PolicyRecord:
    """What was active before, again; a running canary ends. Raises InvalidRequest if nothing was.

    Rolling back twice goes back two steps.
    """
    if not record.history:
        raise InvalidRequest(None, f"policy {record.name!r} has no earlier version to go back to")
    return _next(
        record,
        active=record.history[-1].digest,
        canary=None,
        canary_share=0.0,
        history=record.history[:-1],
    )


def with_canary(record: PolicyRecord, version: Version, share: float) -> PolicyRecord:
    """This version for a share of sessions. Raises InvalidRequest for a share outside (0, 1]."""
    if not 0.0 < share <= 1.0:
        raise InvalidRequest("share", f"{share} is not above 0 and at most 1")
    if version.digest == record.active:
        raise InvalidRequest("digest", f"{version.digest} is active already")
    versions = _with(record.versions, version)
    return _next(record, canary=version.digest, canary_share=share, versions=versions)


def without_canary(record: PolicyRecord) -> PolicyRecord:
    """Everybody gets the active version again."""
    return _next(record, canary=None, canary_share=0.0)


# --- views ---------------------------------------------------------------------------------------


def override_of(record: PolicyRecord) -> Override:
    """What a gateway has to put in force."""
    return Override(
        text=None if record.active is None else record.version(record.active).text,
        canary_text=None if record.canary is None else record.version(record.canary).text,
        canary_share=record.canary_share,
    )


def etag(revision: int, file_digest: str | None) -> str:
    """Changes with the record, and with the file while that is what can be in force."""
    return f'"{revision}-{file_digest or "none"}"'


def revision_of(tag: str, file_digest: str | None) -> int | None:
    """The revision an ``If-Match`` names; None when it speaks of another file. Raises
    InvalidRequest for what is none of our tags.
    """
    match = re.fullmatch(r'(?:W/)?"(\d{1,15})-(\w{1,64})"', tag.strip())
    if match is None:
        raise InvalidRequest("if-match", "not an ETag of a policy")
    return int(match[1]) if match[2] == (file_digest or "none") else None


# --- within bounds -------------------------------------------------------------------------------


def _with(versions: tuple[Version, ...], version: Version) -> tuple[Version, ...]:
    return (*(v for v in versions if v.digest != version.digest), version)


def _next(record: PolicyRecord, **changes: object) -> PolicyRecord:
    """The record with one more revision, its lists cut to their bounds.

    The newest are kept; a version in force is never dropped, and a step without its version is.
    """
    after = msgspec.structs.replace(record, revision=record.revision + 1, **changes)
    in_force = {after.active, after.canary}
    spare = [v.digest for v in after.versions if v.digest not in in_force]
    room = VERSIONS_MAX - (len(after.versions) - len(spare))
    kept = in_force | set(spare[len(spare) - min(room, len(spare)) :])
    versions = tuple(v for v in after.versions if v.digest in kept)
    history = tuple(s for s in after.history if s.digest is None or s.digest in kept)
    return msgspec.structs.replace(after, versions=versions, history=history[-HISTORY_MAX:])
