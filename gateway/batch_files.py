"""The two files of a batch: the input, scanned once and read by line; the output, only appended to.

Both keep fixed-size records per line in memory, whatever the lines hold.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from gateway.batch_lines import (
    DIGEST_BYTES,
    Charge,
    LineRefused,
    RequestLine,
    digest_of,
    is_torn_line,
    parse_request_line,
    read_output_line,
)
from gateway.batch_plan import Codes, Digests, Indices, Tally, duplicates

__all__ = ["BatchError", "InputFile", "OutputFile", "lines_left"]

LINE_BYTES_MAX = 16 * 2**20
OUTPUT_LINE_BYTES_MAX = 2**27  # twice the largest answer that is read
PROBLEMS_SHOWN = 20
_OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND


class BatchError(Exception):
    """The batch cannot go on; the text says why and what helps. What was written stays valid."""


# --- input ---------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Problems:
    """Counts what is wrong; keeps the first few to show, by line number."""

    path: Path
    found: list[tuple[int, str]] = field(default_factory=list)
    count: int = 0

    def add(self, number: int, reason: str) -> None:
        self.count += 1
        self.found = sorted([*self.found, (number, reason)])[:PROBLEMS_SHOWN]

    def raise_if_any(self) -> None:
        if not self.count:
            return
        lines = [f"{self.path}:{number}: {reason}" for number, reason in self.found]
        if (more := self.count - len(self.found)) > 0:
            lines.append(f"and {more} more")
        raise BatchError("nothing was sent, the input is wrong\n" + "\n".join(lines))


class InputFile:
    """The request lines, by index (blank lines have none). Holds offsets and ids, not bodies.

    ``models[model_codes[i]]`` is the model that line i names.
    """

    def __init__(self, path: Path) -> None:
        """Scan and check all of it. Raises BatchError that names every wrong line, up to 20."""
        self._path = path
        self._offsets = array("Q")
        self._numbers = array("I")
        self._ids = bytearray()
        self._codes = array("i")
        self._model_code: dict[str, int] = {}
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise BatchError(f"cannot read {path}: {error.strerror}") from error
        try:
            self._scan()
        except BaseException:
            self._file.close()
            raise

    def __len__(self) -> int:
        return len(self._offsets)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def digests(self) -> Digests:
        """The name of each line's custom_id."""
        return np.frombuffer(bytes(self._ids), dtype=f"S{DIGEST_BYTES}")

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(self._model_code)

    @property
    def model_codes(self) -> Codes:
        return np.array(self._codes, dtype=np.int32)

    def read(self, index: int) -> RequestLine:
        """One line. Raises BatchError if the file is no longer the one that was scanned."""
        self._file.seek(self._offsets[index])
        try:
            line = parse_request_line(self._file.readline(LINE_BYTES_MAX))
        except LineRefused as error:
            raise self._changed(index) from error
        at = index * DIGEST_BYTES
        if digest_of(line.custom_id) != self._ids[at : at + DIGEST_BYTES]:
            raise self._changed(index)
        return line

    def _changed(self, index: int) -> BatchError:
        return BatchError(
            f"{self._path}:{self._numbers[index]}: changed while the batch was running"
        )

    def _scan(self) -> None:
        problems = _Problems(self._path)
        for number, offset, raw in _numbered_lines(self._file, LINE_BYTES_MAX):
            try:
                line = parse_request_line(_bounded(raw))
            except LineRefused as error:
                problems.add(number, str(error))
            else:
                self._note(number, offset, line)
        for again, first in duplicates(self.digests):
            name, earlier = self.read(again).custom_id, self._numbers[first]
            problems.add(self._numbers[again], f"custom_id {name!r} is that of line {earlier}")
        problems.raise_if_any()
        if not len(self):
            raise BatchError(f"{self._path} holds no request")

    def _note(self, number: int, offset: int, line: RequestLine) -> None:
        self._offsets.append(offset)
        self._numbers.append(number)
        self._ids += digest_of(line.custom_id)
        self._codes.append(self._model_code.setdefault(line.model, len(self._model_code)))


def _numbered_lines(file: BinaryIO, bytes_max: int) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset, text) of each line that is not blank.

    Of a line above the bound one byte more than the bound is kept, to tell.
    """
    number, offset = 0, 0
    while raw := file.readline(bytes_max + 1):
        number += 1
        size = len(raw)
        part = raw
        while not part.endswith(b"\n") and (part := file.readline(bytes_max)):
            size += len(part)
        if raw.strip():
            yield number, offset, raw
        offset += size


def _bounded(raw: bytes) -> bytes:
    if len(raw) > LINE_BYTES_MAX:
        raise LineRefused(f"longer than {LINE_BYTES_MAX} bytes")
    return raw


# --- output --------------------------------------------------------------------------------------


class OutputFile:
    """The answers so far. One process writes it at a time; a lock on the file sees to that.

    ``append`` hands a whole line to the operating system: from then on it survives the death of
    this process. ``commit`` puts it on the disk.
    """

    def __init__(self, path: Path) -> None:
        """Open and lock, creating it if need be; cut a torn last line; read what is there.

        Raises:
            BatchError: not an output file, locked by another run, or not writable. Nothing was cut.
        """
        self._path = path
        self.cut_bytes = 0
        self._appended = self._synced = 0
        self._committing = asyncio.Lock()
        try:
            self._fd = os.open(path, _OPEN_FLAGS, 0o644)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._lock()
            self._read_all()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            os.fsync(self._fd)
        finally:
            os.close(self._fd)

    @property
    def digests(self) -> Digests:
        """The names of the custom_ids that stood there when it was opened."""
        return np.frombuffer(bytes(self._ids), dtype=f"S{DIGEST_BYTES}")

    def drop_failed(self) -> None:
        """Take out every line without a good answer, so that it is asked again. Raises BatchError.

        A copy replaces the file in one step: a crash leaves the old one or the new one.
        """
        if not self.tally.total.failed:
            return
        copy = self._path.with_name(self._path.name + ".tmp")
        try:
            fd = os.open(copy, _OPEN_FLAGS | os.O_TRUNC, 0o644)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # held before anybody can open it
                self._copy_good(fd)
                copy.replace(self._path)
            except BaseException:
                os.close(fd)
                raise
            os.close(self._fd)
            self._fd = fd
            _sync_folder(self._path)
        except OSError as error:
            raise self._unwritable(error) from error
        self._read_all()

    def _copy_good(self, fd: int) -> None:
        with os.fdopen(os.dup(fd), "wb") as out, self._reader() as file:
            for _, _, raw in _numbered_lines(file, OUTPUT_LINE_BYTES_MAX):
                if read_output_line(raw)[1].ok:
                    out.write(raw)
        os.fsync(fd)

    def append(self, line: bytes) -> None:
        """Write one line, newline included. Raises BatchError; the line may then be torn."""
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        except OSError as error:
            raise self._unwritable(error) from error
        self._appended += 1

    async def commit(self) -> None:
        """Return once every line appended before the call is on the disk.

        Callers that wait at the same time share one fsync. Raises BatchError.
        """
        wanted = self._appended
        async with self._committing:
            if self._synced >= wanted:
                return
            reached = self._appended
            try:
                await asyncio.to_thread(os.fsync, self._fd)
            except OSError as error:
                raise self._unwritable(error) from error
            self._synced = reached

    def _reader(self) -> BinaryIO:
        """The whole file from its start; closing it leaves ours open."""
        file = os.fdopen(os.dup(self._fd), "rb")
        file.seek(0)
        return file

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BatchError(f"another coe batch is writing {self._path}") from error
        if not os.path.samestat(os.fstat(self._fd), self._path.stat()):
            raise BatchError(f"{self._path} was replaced while it was being opened")

    def _read_all(self) -> None:
        """Learn what is there; cut a torn end, complete an end that lacks only its newline."""
        self.tally = Tally()
        self._ids = bytearray()
        size = os.fstat(self._fd).st_size
        with self._reader() as file:
            for number, offset, raw in _numbered_lines(file, OUTPUT_LINE_BYTES_MAX):
                try:
                    self._note(*read_output_line(raw))
                except LineRefused as error:
                    if offset + len(raw) < size or raw.endswith(b"\n") or not is_torn_line(raw):
                        raise self._foreign(number, error) from error
                    self._cut(offset, size)
                else:
                    if not raw.endswith(b"\n"):
                        self.append(b"\n")
        if not size:
            _sync_folder(self._path)

    def _note(self, custom_id: str, charge: Charge) -> None:
        self._ids += digest_of(custom_id)
        self.tally.add(charge)

    def _cut(self, offset: int, size: int) -> None:
        os.ftruncate(self._fd, offset)
        os.fsync(self._fd)
        self.cut_bytes = size - offset

    def _foreign(self, number: int, why: LineRefused) -> BatchError:
        return BatchError(
            f"{self._path}:{number}: not a line of a batch output ({why}). "
            "Name another output file, or take that line out."
        )

    def _unwritable(self, error: OSError) -> BatchError:
        return BatchError(f"cannot write {self._path}: {error.strerror}. Run again to go on.")


def _sync_folder(path: Path) -> None:
    """A new file's name is on the disk only once its folder is."""
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def lines_left(source: InputFile, target: OutputFile) -> Indices:
    """The lines without an answer, in input order. Raises BatchError if the two do not belong."""
    mine, written = source.digests, target.digests
    if strangers := int(np.count_nonzero(~np.isin(written, mine))):
        raise BatchError(
            f"the output has {strangers} lines whose custom_id is not in the input: "
            "it belongs to another batch. Name another output file."
        )
    return np.flatnonzero(~np.isin(mine, written))
