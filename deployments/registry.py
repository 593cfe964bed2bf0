"""The host registry in the state store: hosts announce themselves, gateways list who is alive.

A host that falls silent for its own ``ttl_ms`` is gone, by the store's clock. The key layout stands
at the head of the Lua files.
"""

from __future__ import annotations

import logging

import msgspec

from deployments.host_directory import HostDirectory
from deployments.host_record import (
    HostRecord,
    RegistrySnapshot,
    encode_record,
    record_from_json,
    record_to_json,
)
from deployments.store import StateStore, load_script

__all__ = [
    "HostDirectory",
    "HostRecord",
    "HostRegistry",
    "RegistrySnapshot",
    "encode_record",
    "progress_key",
    "publish_progress",
]

log = logging.getLogger(__name__)

RECORD_BYTES_MAX = 1 << 20
_PROGRESS_CHARS_MAX = 500
_PROGRESS_TTL_S = 600
_SCRIPTS = ("publish_host", "list_hosts", "remove_host")


class HostRegistry:
    """Reads and writes host records. Every method raises StateUnavailable when the store is away.

    A host id names one life of one host: a host that starts again takes a new id.
    """

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._keys = [store.key("{hosts}", part) for part in ("records", "expiry")]
        self._epoch_key = store.key("{hosts}", "epoch")
        self._unreadable: frozenset[str] = frozenset()
        for name in _SCRIPTS:
            store.add_script(name, load_script("deployments", f"lua/{name}.lua"))

    async def publish(self, record: HostRecord, ttl_ms: int) -> None:
        """Register the host, or renew it, until ``ttl_ms`` from now."""
        raw = record_to_json(record)
        if ttl_ms <= 0 or len(raw) > RECORD_BYTES_MAX:
            raise ValueError(f"ttl_ms={ttl_ms}, record of {len(raw)} bytes")
        await self._store.eval_script("publish_host", self._keys, [record.host_id, raw, ttl_ms])

    async def remove(self, host_id: str) -> None:
        """Take the host out at once, without waiting for its record to expire."""
        await self._store.eval_script("remove_host", self._keys, [host_id])

    async def list_live(self) -> list[HostRecord]:
        """All hosts whose last heartbeat has not expired, ordered by id."""
        return list((await self.snapshot()).records)

    async def snapshot(self) -> RegistrySnapshot:
        """``list_live`` with the epoch of the store's data."""
        epoch, *pairs = await self._store.eval_script(
            "list_hosts", [*self._keys, self._epoch_key], []
        )
        raw_by_id = {host.decode(): raw for host, raw in zip(pairs[::2], pairs[1::2], strict=True)}
        return RegistrySnapshot(int(epoch), self._readable(raw_by_id))

    def _readable(self, raw_by_id: dict[str, bytes]) -> tuple[HostRecord, ...]:
        """One host's unreadable record must not hide the others; it is logged when first seen."""
        records: list[HostRecord] = []
        unreadable: dict[str, str] = {}
        for host_id, raw in sorted(raw_by_id.items()):
            try:
                records.append(record_from_json(raw))
            except msgspec.DecodeError as error:
                unreadable[host_id] = str(error)
        for host_id in unreadable.keys() - self._unreadable:
            log.error("host %s has an unreadable record: %s", host_id, unreadable[host_id])
        self._unreadable = frozenset(unreadable)
        return tuple(records)


def progress_key(host_name: str) -> str:
    """Where the news of a starting host stands, in the default namespace."""
    return f"coe:host-progress:{host_name}"


async def publish_progress(store: StateStore, host_name: str, note: str) -> None:
    """One line of news of a starting host, for whoever waits for it. Raises StateUnavailable."""
    key = progress_key(host_name)
    await store.command("SET", key, note[:_PROGRESS_CHARS_MAX], "EX", _PROGRESS_TTL_S)
