"""Policy versions in the shared store: read, changed in one step, followed by every gateway.

Orders are decided by ``gateway.policy_versions`` on what was read and written back only if nobody
else wrote meanwhile. Every method raises StateUnavailable when the store is away.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

import msgspec

from deployments.store import StateStore, load_script
from experts.errors import CoeError, InvalidRequest, RevisionChanged, StateUnavailable
from gateway.policy_versions import PolicyRecord, override_of
from policies.policy_set import Override

__all__ = ["PolicyFollower", "PolicyStore"]

log = logging.getLogger(__name__)

POLICIES_MAX = 256
_ATTEMPTS = 8
_PACKAGE = "gateway.state"
_DECODER = msgspec.json.Decoder(PolicyRecord)


class PolicyStore:
    """Reads and changes the records."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._records = store.key("{policies}", "records")
        self._revisions = store.key("{policies}", "revisions")
        self._changes = store.key("{policies}", "changes")
        for name in ("swap", "read"):
            store.add_script(f"policy_{name}", load_script(_PACKAGE, f"policy_{name}.lua"))

    async def get(self, name: str) -> PolicyRecord:
        """The record; an empty one for a policy that the store knows nothing of."""
        raw = await self._store.command("HGET", self._records, name)
        return PolicyRecord(name) if raw is None else _DECODER.decode(raw)

    async def read(self, seen: str = "") -> tuple[str, dict[str, PolicyRecord] | None]:
        """The count of changes, and all records by name; None for those if nothing has changed."""
        changes, *raw = await self._store.eval_script(
            "policy_read", [self._records, self._changes], [seen]
        )
        count = changes.decode()
        if count == seen:
            return count, None
        records = [_DECODER.decode(one) for one in raw]
        return count, {record.name: record for record in records}

    async def change(
        self,
        name: str,
        order: Callable[[PolicyRecord], PolicyRecord],
        *,
        revision: int | None = None,
    ) -> PolicyRecord:
        """Carry ``order`` out on the record and return what was written.

        ``revision``: only if the record has it still. Raises RevisionChanged, what ``order``
        raises, and InvalidRequest for more than POLICIES_MAX policies.
        """
        for _ in range(_ATTEMPTS):
            before = await self.get(name)
            if revision is not None and before.revision != revision:
                raise RevisionChanged(f"policy {name!r}")
            after = order(before)
            written = await self._store.eval_script(
                "policy_swap",
                [self._records, self._revisions, self._changes],
                [name, str(before.revision), msgspec.json.encode(after), POLICIES_MAX],
            )
            if written == 1:
                return after
            if written < 0:
                raise InvalidRequest("name", f"the store holds {POLICIES_MAX} policies already")
        raise RevisionChanged(f"policy {name!r}")


class PolicyFollower:
    """Tells one worker's policies what the store says, ``every_ms`` at the latest.

    While the store is away the last known versions stay in force.
    """

    def __init__(
        self,
        policies: PolicyStore,
        tell: Callable[[Mapping[str, Override]], object],
        *,
        every_ms: float = 250.0,
    ) -> None:
        self._policies = policies
        self._tell = tell
        self._every_s = every_ms / 1000.0
        self._seen = ""
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Ask once, so that the first request finds the right versions, then keep asking."""
        await self._look()
        if self._task is None:
            self._task = asyncio.create_task(self._follow(), name="policy-follower")

    async def aclose(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def refresh(self) -> None:
        """Look now; for whoever has just changed something. Raises StateUnavailable."""
        seen, records = await self._policies.read(self._seen)
        if records is not None:
            self._tell({name: override_of(record) for name, record in records.items()})
        self._seen = seen

    async def _look(self) -> None:
        try:
            await self.refresh()
        except StateUnavailable:
            return  # what is known stays in force; readiness tells that the store is away
        except (msgspec.DecodeError, CoeError):
            log.exception("the store's policies cannot be read")

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            await self._look()
