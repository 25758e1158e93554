"""What clients store: files of bytes with a name, each in its tenant's shelf, within limits.

    store/                     0700; one server at a time holds its lock
      <hash of the tenant>/    a shelf
        file-<id>.json         a record, written last: without it there is no file
        file-<id>.data         its content
        batch_<id>.json        :mod:`tenon.server.batches`
        batch_<id>.journal
        .incoming-<id>         what is still being written; removed at the next start

No name that a client gives is ever part of a path.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import logging
import os
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

import msgspec

from tenon.base import files as disk
from tenon.base.clock import Clock
from tenon.base.errors import RequestError, ResourceError
from tenon.server.failures import Refusal
from tenon.server.limits import BodyTooLarge, Limits

FILE_ID: Final = re.compile(r"file-[0-9a-f]{24}")
FILE_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\- ]{0,127}")
PIECE_BYTES: Final = 256 * 2**10
_INCOMING: Final = ".incoming-"
_SHELF: Final = re.compile(r"[0-9a-f]{32}")
R = TypeVar("R")
_log = logging.getLogger("tenon.server")


class StoreFull(BodyTooLarge):
    """The tenant has no room for more. Not 507: clients repeat what gets a status from 500 on, and an upload that did
    not fit does not fit the second time."""

    def __init__(self, message: str) -> None:
        RequestError.__init__(self, message, code="storage_limit_exceeded")


class FileRecord(msgspec.Struct, frozen=True):
    """A stored file, as it is told to its owner."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    object: str = "file"
    status: str = "processed"


def read_record(path: Path, kind: type[R]) -> R:
    """Raises ``ResourceError`` naming a file that is damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise ResourceError(f"the store's {path} is damaged ({error}); move it away", subject=str(path)) from error


def new_id(kind: str) -> str:
    return f"{kind}{secrets.token_hex(12)}"


class Draft:
    """A file that is being written. A limited one counts for its tenant from the first byte, another when it is kept;
    both leave nothing where they are given up."""

    def __init__(self, shelf: Shelf, *, is_limited: bool) -> None:
        self._shelf, self._is_limited = shelf, is_limited
        self._path = shelf.folder / f"{_INCOMING}{secrets.token_hex(12)}"
        self._file: BinaryIO = os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        self.n_bytes = 0

    @property
    def limit_bytes(self) -> int:
        return self._shelf.limits.file_bytes

    def count(self, n_bytes: int) -> None:
        """So many more are coming. Raises ``BodyTooLarge`` or ``StoreFull``."""
        if self._is_limited:
            if self.n_bytes + n_bytes > self._shelf.limits.file_bytes:
                raise BodyTooLarge(self._shelf.limits.file_bytes)
            self._shelf.take_bytes(n_bytes)
        self.n_bytes += n_bytes

    def counted(self) -> None:
        """It is a file now, and counts in any case."""
        if not self._is_limited:
            self._shelf.take_bytes(self.n_bytes, is_limited=False)

    def write(self, data: bytes) -> None:
        """What has been counted. Raises ``Refusal`` (507) where the disk is full."""
        try:
            self._file.write(data)
        except OSError as error:
            raise no_disk(error) from error

    def finish(self, record: FileRecord) -> None:
        """On disk, under its own name, then its record."""
        content, told = self._shelf.content_path(record.id), self._shelf.folder / f"{record.id}.json"
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._path, content)
            disk.write_bytes(told, msgspec.json.encode(record), mode=0o600)
        except (OSError, ResourceError) as error:
            raise no_disk(error) from error

    def drop(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)
        if self._is_limited:
            self._shelf.give_bytes(self.n_bytes)


def no_disk(error: Exception) -> Refusal:
    """What a client is told: nothing of paths."""
    _log.error("the store cannot be written: %s", error)
    return Refusal("the server's disk takes no more", status=507, code="disk_full")


class Shelf:
    """One tenant's files. What changes them runs in the event loop; what waits for the disk in a thread."""

    def __init__(self, folder: Path, limits: Limits, clock: Clock) -> None:
        self.folder, self.limits = folder, limits
        self._clock = clock
        self._files: dict[str, FileRecord] = {}
        self._n_drafts = 0
        self.n_bytes = 0
        """Of files, of those that are coming, and of what batches have answered so far."""
        folder.mkdir(mode=0o700, exist_ok=True)
        self._read()

    def _read(self) -> None:
        for path in self.folder.glob(f"{_INCOMING}*"):
            path.unlink()
        for path in self.folder.glob("file-*.json"):
            record = read_record(path, FileRecord)
            self._files[record.id] = record
            self.n_bytes += record.bytes
        for path in self.folder.glob("file-*.data"):
            if path.stem not in self._files:  # ended before it had its record
                path.unlink()

    def content_path(self, file_id: str) -> Path:
        return self.folder / f"{file_id}.data"

    def files(self) -> list[FileRecord]:
        """The oldest first."""
        return sorted(self._files.values(), key=lambda record: (record.created_at, record.id))

    def get(self, file_id: str) -> FileRecord:
        """Raises ``Refusal`` (404); whether another tenant has it is not told."""
        record = self._files.get(file_id) if FILE_ID.fullmatch(file_id) else None
        if record is None:
            raise Refusal(f"there is no file {file_id[:64]!r} here", status=404, code="not_found", param="file_id")
        return record

    def take_bytes(self, n_bytes: int, *, is_limited: bool = True) -> None:
        """Raises ``StoreFull``."""
        most = self.limits.store_bytes
        if is_limited and self.n_bytes + n_bytes > most:
            raise StoreFull(f"your files and batches take {self.n_bytes} of {most} bytes; delete what is not needed")
        self.n_bytes += n_bytes

    def give_bytes(self, n_bytes: int) -> None:
        self.n_bytes -= n_bytes

    def draft(self, *, is_limited: bool = True) -> Draft:
        """Raises ``StoreFull`` where there are too many files. What batches answered is not limited again."""
        if is_limited and len(self._files) + self._n_drafts >= self.limits.max_files:
            raise StoreFull(f"you have {self.limits.max_files} files, which is the limit; delete what is not needed")
        try:
            draft = Draft(self, is_limited=is_limited)
        except OSError as error:
            raise no_disk(error) from error
        self._n_drafts += 1
        return draft

    async def keep(self, draft: Draft, filename: str, purpose: str, file_id: str | None = None) -> FileRecord:
        """The draft becomes a file. ``file_id``: under this id, perhaps in place of what was there."""
        created_s = int(self._clock.wall_s())
        record = FileRecord(file_id or new_id("file-"), draft.n_bytes, created_s, filename, purpose)
        try:
            await asyncio.to_thread(draft.finish, record)
        except BaseException:
            self.abandon(draft)
            raise
        self._n_drafts -= 1
        draft.counted()
        old = self._files.get(record.id)
        self.n_bytes -= old.bytes if old is not None else 0
        self._files[record.id] = record
        return record

    def abandon(self, draft: Draft) -> None:
        self._n_drafts -= 1
        draft.drop()

    async def delete(self, file_id: str) -> None:
        """Raises ``Refusal`` (404)."""
        record = self.get(file_id)
        del self._files[file_id]
        self.n_bytes -= record.bytes
        await asyncio.to_thread(self._unlink, file_id)

    def _unlink(self, file_id: str) -> None:
        (self.folder / f"{file_id}.json").unlink(missing_ok=True)
        self.content_path(file_id).unlink(missing_ok=True)

    def content(self, file_id: str) -> AsyncIterator[bytes]:
        """Its bytes, piece by piece: those it has now, though it be deleted on the way. Raises ``Refusal`` (404)."""
        self.get(file_id)
        return _pieces(self.content_path(file_id).open("rb"))


async def _pieces(file: BinaryIO) -> AsyncIterator[bytes]:
    with file:
        while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
            yield piece


class Store:
    """The folder of all shelves."""

    def __init__(self, folder: Path, limits: Limits, clock: Clock) -> None:
        """Raises ``ResourceError`` where the folder cannot be used, is damaged, or another server uses it."""
        self.folder = folder
        self._limits, self._clock = limits, clock
        self._shelves: dict[str, Shelf] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            said = f"the store {folder} cannot be used: {error.strerror or error}; give another with --store"
            raise ResourceError(said, subject="store") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            said = f"the store {folder} is used by another server; give another folder with --store"
            raise ResourceError(said, subject="store") from error
        try:
            for path in folder.iterdir():
                if _SHELF.fullmatch(path.name):
                    self._shelves[path.name] = Shelf(path, limits, clock)
        except BaseException:
            os.close(self._lock)
            raise

    def shelf(self, tenant: str) -> Shelf:
        name = hashlib.sha256(tenant.encode()).hexdigest()[:32]
        if name not in self._shelves:
            self._shelves[name] = Shelf(self.folder / name, self._limits, self._clock)
        return self._shelves[name]

    def batch_records(self) -> Iterator[Path]:
        """Of all tenants."""
        yield from sorted(self.folder.glob("*/batch_*.json"))

    def close(self) -> None:
        os.close(self._lock)
