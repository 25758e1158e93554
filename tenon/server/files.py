"""Files that clients leave here, for batches: OpenAI's ``/v1/files``.

    STORE/<tenant>/file-<24 hex>.jsonl      the content
    STORE/<tenant>/file-<24 hex>.json       what is said of it; a content without it is none, and swept away

A tenant sees its own. Ids are drawn here and checked before they become a path; names that clients give are said of a
file and never one.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tenon.base import files
from tenon.base.clock import Clock
from tenon.base.errors import RequestError
from tenon.server.failures import Refusal
from tenon.server.limits import BodyTooLarge

FILE_BYTES: Final = 64 * 2**20
TENANT_BYTES: Final = 512 * 2**20
TENANT_FILES: Final = 1000
PURPOSES: Final = ("batch",)
_ID: Final = re.compile(r"file-[0-9a-f]{24}")


@dataclass(frozen=True)
class Stored:
    """One file. ``path``: its content."""

    id: str
    filename: str
    purpose: str
    n_bytes: int
    created: int
    path: Path

    def to_json(self) -> dict[str, Any]:
        """OpenAI's file object."""
        return {
            "id": self.id, "object": "file", "bytes": self.n_bytes, "created_at": self.created,
            "filename": self.filename, "purpose": self.purpose, "status": "processed", "expires_at": None,
        }  # fmt: skip


def tenant_folder(store: Path, tenant: str) -> Path:
    """Where a tenant's things are: its name may hold anything, a hash of it does not."""
    return store / hashlib.sha256(tenant.encode()).hexdigest()[:32]


class FileStore:
    """All tenants' files under one folder. Used by one event loop."""

    def __init__(self, store: Path, clock: Clock) -> None:
        self._store, self._clock = store, clock

    def list(self, tenant: str) -> list[Stored]:
        """The tenant's, newest first."""
        folder = tenant_folder(self._store, tenant)
        found = [self._read(path) for path in folder.glob("file-*.json")] if folder.is_dir() else []
        return sorted(found, key=lambda one: (one.created, one.id), reverse=True)

    def get(self, tenant: str, file_id: str) -> Stored:
        """Raises ``Refusal`` (404)."""
        path = tenant_folder(self._store, tenant) / f"{file_id}.json"
        if not _ID.fullmatch(file_id) or not path.is_file():
            raise Refusal(f"there is no file {file_id!r:.80}", status=404, code="file_not_found", param="file_id")
        return self._read(path)

    async def take(self, tenant: str, filename: str, purpose: str, pieces: AsyncIterator[bytes]) -> Stored:
        """Keep what comes, whole or not at all. Raises ``RequestError`` for what is too much."""
        if purpose not in PURPOSES and purpose != "batch_output":
            said = f"purpose must be {' or '.join(PURPOSES)}, got {purpose!r:.40}"
            raise RequestError(said, param="purpose", code="invalid_value")
        there = self.list(tenant)
        if len(there) >= TENANT_FILES:
            raise Refusal(f"there are {len(there)} files, which is the limit", status=413, code="too_many_files")
        room = TENANT_BYTES - sum(one.n_bytes for one in there)
        file_id = f"file-{secrets.token_hex(12)}"
        folder = tenant_folder(self._store, tenant)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path, n_bytes = folder / f"{file_id}.jsonl", 0
        try:
            with path.open("xb") as file:
                async for piece in pieces:
                    n_bytes += len(piece)
                    if n_bytes > FILE_BYTES:
                        raise BodyTooLarge(FILE_BYTES)
                    if n_bytes > room:
                        said = f"files of {TENANT_BYTES} bytes in all are kept; delete some"
                        raise Refusal(said, status=413, code="storage_full")
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
            return self._say(path, filename, purpose)
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def adopt(self, tenant: str, path: Path, filename: str) -> Stored:
        """Make a file that a batch has written one of the tenant's."""
        target = tenant_folder(self._store, tenant) / f"file-{secrets.token_hex(12)}.jsonl"
        os.replace(path, target)
        return self._say(target, filename, "batch_output")

    def delete(self, tenant: str, file_id: str) -> None:
        """Raises ``Refusal`` (404)."""
        found = self.get(tenant, file_id)
        found.path.with_suffix(".json").unlink()
        found.path.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Drop contents of which nothing is said: their upload was cut. At a start, before there are any uploads."""
        for path in self._store.glob("*/file-*.jsonl"):
            if not path.with_suffix(".json").exists():
                path.unlink(missing_ok=True)

    def _say(self, path: Path, filename: str, purpose: str) -> Stored:
        said = {
            "filename": filename[:255], "purpose": purpose, "bytes": path.stat().st_size,
            "created_at": int(self._clock.wall_s()),
        }  # fmt: skip
        files.write_json(path.with_suffix(".json"), said, mode=0o600)
        return self._read(path.with_suffix(".json"))

    def _read(self, path: Path) -> Stored:
        said = files.read_json(path)
        return Stored(
            path.stem, said["filename"], said["purpose"], said["bytes"], said["created_at"], path.with_suffix(".jsonl")
        )
