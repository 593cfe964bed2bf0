"""All experts' weights in host memory, in the layout of the engine that runs them.

A pool entry is ONE host allocation holding a copy of every tensor of a running model, at the
offsets of a shared ``TensorLayout``. Making an expert resident copies the entry's tensors into the
engine's own parameters: addresses on the device stay what they were, so captured graphs stay valid,
and nothing is ever copied back, because weights do not change while they serve.

On CUDA the allocation is page-locked by registering it with the driver. (torch's own pinned
allocator rounds every block up to a power of two, which for one block per expert can double the
host memory.) Copies are then asynchronous, spread over a few streams. On a CPU machine the code
path is the same without page-locking and streams.

This module knows torch and nothing of vLLM; ``experts.vllm_worker`` finds the tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from experts.pool_eviction import EvictionScores

_ALIGN_BYTES = 256  # a multiple of every dtype size and of the device's copy granularity
_DIGEST_CHUNK_BYTES = 16 << 20


class PoolError(Exception):
    """An entry cannot be pooled or copied; the text says which tensor and why."""


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where one tensor lives in an entry: ``offset_bytes`` from its start, ``size_bytes`` long."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class TensorLayout:
    """The tensors of one architecture as one engine holds them, with their place in an entry."""

    slots: tuple[TensorSlot, ...]
    total_bytes: int

    @property
    def payload_bytes(self) -> int:
        """Bytes that a swap copies, without alignment gaps."""
        return sum(slot.size_bytes for slot in self.slots)

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> TensorLayout:
        slots: list[TensorSlot] = []
        offset = 0
        for name, tensor in tensors.items():
            size = tensor.numel() * tensor.element_size()
            slots.append(TensorSlot(name, tuple(tensor.shape), tensor.dtype, offset, size))
            offset += -(-size // _ALIGN_BYTES) * _ALIGN_BYTES
        return cls(tuple(slots), offset)

    def differences(self, other: TensorLayout) -> dict[str, str]:
        """Name -> what differs; empty when entries of both layouts are interchangeable."""
        mine = {s.name: s for s in self.slots}
        theirs = {s.name: s for s in other.slots}
        found: dict[str, str] = {}
        for name in mine.keys() | theirs.keys():
            a, b = mine.get(name), theirs.get(name)
            if a is None or b is None:
                found[name] = "missing here" if a is None else "missing there"
            elif (a.shape, a.dtype) != (b.shape, b.dtype):
                found[name] = f"{a.shape} {a.dtype} here, {b.shape} {b.dtype} there"
        return found


class PooledWeights:
    """One expert's weights: a flat host buffer and typed views into it.

    ``digest``: of the bytes when ``seal`` was last called.
    """

    def __init__(self, layout: TensorLayout, *, pin: bool) -> None:
        self.layout = layout
        self.digest = ""
        self._flat = torch.empty(layout.total_bytes, dtype=torch.uint8)
        self._registered = pin and _register_host_memory(self._flat)
        self.views: dict[str, torch.Tensor] = {
            slot.name: self._flat[slot.offset_bytes : slot.offset_bytes + slot.size_bytes]
            .view(slot.dtype)
            .view(slot.shape)
            for slot in layout.slots
        }

    def seal(self) -> None:
        """The weights are complete: take the SHA-256 over every tensor's name, type, shape and
        bytes, in layout order."""
        hasher = hashlib.sha256()
        for slot in self.layout.slots:
            hasher.update(f"{slot.name}|{slot.dtype}|{slot.shape}|".encode())
            start, stop = slot.offset_bytes, slot.offset_bytes + slot.size_bytes
            for at in range(start, stop, _DIGEST_CHUNK_BYTES):
                hasher.update(self._flat[at : min(at + _DIGEST_CHUNK_BYTES, stop)].numpy().data)
        self.digest = hasher.hexdigest()

    def release(self) -> None:
        """Give the page lock back; the buffer itself goes with the last view."""
        if self._registered:
            _unregister_host_memory(self._flat)
            self._registered = False
        self.views = {}


class WeightPool:
    """Entries by expert id, bounded by ``limit_bytes``. Owned by the worker of the engine.

    All entries have one layout, so an entry that is given up lends its buffer to the newcomer:
    memory is page-locked once and never again.
    """

    def __init__(self, layout: TensorLayout, *, limit_bytes: int, pin: bool) -> None:
        self.layout = layout
        self.entries_max = limit_bytes // layout.total_bytes
        if self.entries_max < 1:
            raise PoolError(
                f"host_memory_bytes = {limit_bytes} holds no expert of {layout.total_bytes} bytes"
            )
        self._pin = pin
        self._entries: dict[str, PooledWeights] = {}
        self._spare: list[PooledWeights] = []
        self._buffers = 0  # made so far: entries, spare ones and those lent out
        self._scores = EvictionScores()

    @property
    def used_bytes(self) -> int:
        return self._buffers * self.layout.total_bytes

    def __contains__(self, expert: object) -> bool:
        return expert in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def digests(self) -> dict[str, str]:
        """Of every entry."""
        return {expert: entry.digest for expert, entry in self._entries.items()}

    def views(self, expert: str) -> Mapping[str, torch.Tensor]:
        """The entry's tensors. Raises PoolError."""
        return self._entry(expert).views

    def snapshot(
        self, expert: str, tensors: Mapping[str, torch.Tensor], *, cost_s: float
    ) -> PooledWeights:
        """Copy the engine's present tensors into an entry for ``expert``; may evict another.

        ``cost_s``: what loading them from disk took.
        """
        differences = self.layout.differences(TensorLayout.of(tensors))
        if differences:
            raise PoolError(f"{expert}: the engine's tensors changed: {differences}")
        entry = self._entries.get(expert) or self.reserve()
        assert entry is not None  # nothing was to be kept
        for name, tensor in tensors.items():
            entry.views[name].copy_(tensor)
        entry.seal()
        self.install(expert, entry, cost_s=cost_s)
        return entry

    def reserve(self, keep: Collection[str] = ()) -> PooledWeights | None:
        """A buffer to load another expert into: a new one while there is room, else that of the
        least valuable entry outside ``keep``; None when all must be kept.

        Its contents are undefined. It goes back by ``install`` or ``give_back``.
        """
        if self._spare:
            return self._spare.pop()
        if self._buffers < self.entries_max:
            made = PooledWeights(self.layout, pin=self._pin)
            self._buffers += 1
            return made
        candidates = [expert for expert in self._entries if expert not in keep]
        if not candidates:
            return None
        victim = self._scores.victim(candidates)
        self._scores.evicted(victim)
        return self._entries.pop(victim)

    def install(self, expert: str, entry: PooledWeights, *, cost_s: float) -> None:
        """From now on ``entry`` holds ``expert``'s weights. ``cost_s``: what loading them took."""
        self._entries[expert] = entry
        self._scores.loaded(expert, cost_s=cost_s, size_bytes=self.layout.payload_bytes)

    def give_back(self, entry: PooledWeights) -> None:
        """A reserved buffer that nothing came of."""
        self._spare.append(entry)

    def copy_into(self, expert: str, tensors: Mapping[str, torch.Tensor]) -> int:
        """Overwrite the engine's tensors with ``expert``'s; returns the bytes copied."""
        entry = self._entry(expert)
        copy = _copy_over_streams if self._pin else _copy_on_host
        copy(entry.views, tensors)
        self._scores.used(expert)
        return self.layout.payload_bytes

    def drop(self, expert: str) -> None:
        """Give an entry and its memory up; unknown experts are ignored."""
        entry = self._entries.pop(expert, None)
        if entry is not None:
            self._scores.evicted(expert)
            self._buffers -= 1
            entry.release()

    def _entry(self, expert: str) -> PooledWeights:
        entry = self._entries.get(expert)
        if entry is None:
            raise PoolError(f"{expert}: not in the weight pool")
        return entry


def _copy_on_host(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])


def chunk_pairs(
    source: Mapping[str, torch.Tensor],
    target: Mapping[str, torch.Tensor],
    chunk_bytes: int = 64 << 20,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of flat byte views that cover every tensor once, none longer than ``chunk_bytes``.

    An embedding of a gigabyte on one stream would leave the others idle at the end.
    """
    for name, tensor in target.items():
        wanted = tensor.view(-1).view(torch.uint8)
        held = source[name].view(-1).view(torch.uint8)
        yield from zip(held.split(chunk_bytes), wanted.split(chunk_bytes), strict=True)


_COPY_STREAMS = 2
_streams: dict[torch.device, list[Any]] = {}


def _copy_over_streams(
    source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]
) -> None:
    """Page-locked host to device, in chunks round robin over streams; complete on return."""
    device = next(iter(target.values())).device
    if device not in _streams:
        _streams[device] = [torch.cuda.Stream(device) for _ in range(_COPY_STREAMS)]
    streams = _streams[device]
    torch.cuda.current_stream(device).synchronize()  # nothing may still read the old weights
    for at, (chunk, place) in enumerate(chunk_pairs(source, target)):
        with torch.cuda.stream(streams[at % len(streams)]):
            place.copy_(chunk, non_blocking=True)
    for stream in streams:
        stream.synchronize()


def _register_host_memory(flat: torch.Tensor) -> bool:
    status: Any = torch.cuda.cudart().cudaHostRegister(flat.data_ptr(), flat.numel(), 0)
    if int(status) != 0:
        raise PoolError(
            f"page-locking {flat.numel()} bytes failed (CUDA status {int(status)}); "
            "raise the locked-memory limit (ulimit -l) or lower host_memory_bytes"
        )
    return True


def _unregister_host_memory(flat: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(flat.data_ptr())


def swappable_tensors(
    model: torch.nn.Module, *, ignore: Callable[[str], bool]
) -> dict[str, torch.Tensor]:
    """Every weight of ``model`` once (tied tensors share storage), or PoolError.

    Parameters and persistent buffers are swapped. Non-persistent buffers are derived from the
    configuration (rotary tables) and must agree between experts, which ``experts.compat`` checks.
    A tensor that hangs on a module as a plain attribute would silently keep the previous expert's
    values, so a model that has one is refused rather than swapped wrongly.
    """
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    derived: set[int] = set()
    for prefix, module in model.named_modules():
        own: dict[str, torch.Tensor | None] = {**module._parameters}
        for name, buffer in module._buffers.items():
            if name in module._non_persistent_buffers_set:
                derived.add(buffer.data_ptr() if buffer is not None else 0)
            else:
                own[name] = buffer
        for name, tensor in own.items():
            if tensor is None or tensor.numel() == 0 or tensor.data_ptr() in seen:
                continue
            if not tensor.is_contiguous():
                raise PoolError(f"{prefix}.{name}: not contiguous, cannot be swapped in place")
            seen.add(tensor.data_ptr())
            tensors[f"{prefix}.{name}"] = tensor.data
    _refuse_hidden_tensors(model, seen | derived, ignore)
    return tensors


def _refuse_hidden_tensors(
    model: torch.nn.Module, known: set[int], ignore: Callable[[str], bool]
) -> None:
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if (
                isinstance(value, torch.Tensor)
                and value.numel() > 1
                and value.data_ptr() not in known
                and not ignore(name)
            ):
                raise PoolError(
                    f"{prefix}.{name}: a weight tensor outside parameters and buffers; this "
                    "architecture cannot be swapped in place"
                )
