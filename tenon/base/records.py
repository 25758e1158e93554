"""Run records: what happened, one JSON object a line, in ``runs/<run>/events.jsonl``.

The file only grows. Its first line is ``{"kind": "run", "version": 1, ...}``; every record has a ``kind``, a wall
stamp ``at_s`` and fields of its own. A process that dies may leave a torn last line: the reader drops it, the writer
cuts it off before it goes on. A torn line anywhere else means damage and is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tenon.base import clock as clocks
from tenon.base.errors import ConfigError, ResourceError

VERSION = 1
FILE_NAME = "events.jsonl"
RESERVED = frozenset({"kind", "at_s"})


class RecordWriter:
    """Appends records to ``folder/events.jsonl``; reopening goes on after the last whole line.

    One writer per folder. ``sync=True`` also waits for the disk at each record.
    """

    def __init__(self, folder: Path, *, clock: clocks.Clock = clocks.SYSTEM, sync: bool = False) -> None:
        self.path = folder / FILE_NAME
        self._clock = clock
        self._sync = sync
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            end = _whole_bytes(self._fd)
            os.ftruncate(self._fd, end)
            os.lseek(self._fd, end, os.SEEK_SET)
        except OSError as error:
            raise ResourceError(
                f"cannot open {self.path}: {error.strerror or error}", subject=str(self.path)
            ) from error
        if end == 0:
            self.write("run", version=VERSION)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one record. Raises ``ValueError`` for a field named like a reserved one or a NaN."""
        taken = RESERVED & fields.keys()
        if taken:
            raise ValueError(f"a record's own fields may not be named {sorted(taken)}")
        record = {"kind": kind, "at_s": round(self._clock.wall_s(), 6), **fields}
        line = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._fd, line) :]
            if self._sync:
                os.fsync(self._fd)
        except OSError as error:
            raise ResourceError(
                f"cannot write {self.path}: {error.strerror or error}", subject=str(self.path)
            ) from error

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_records(folder: Path) -> Iterator[dict[str, Any]]:
    """The whole records of a run, the opening one included.

    A torn last line is dropped. Raises ``ConfigError`` naming the line for anything else that is not a record, and for
    a version that this reader does not know.
    """
    path = folder / FILE_NAME
    try:
        file = path.open("rb")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", subject=str(path)) from error
    with file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            record = _parse(line, path, number)
            if number == 1 and (record["kind"] != "run" or record.get("version") != VERSION):
                raise ConfigError(
                    f"{path} opens with {record['kind']!r} version {record.get('version')!r}; "
                    f"this reader knows 'run' version {VERSION}",
                    subject=str(path),
                )
            yield record


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} line {number} is not JSON: {error}", subject=str(path)) from error
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        raise ConfigError(f"{path} line {number} is not a record: it has no kind", subject=str(path))
    return record


def _whole_bytes(fd: int) -> int:
    """Bytes up to and with the last newline."""
    end = os.lseek(fd, 0, os.SEEK_END)
    step = 65536
    while end > 0:
        start = max(0, end - step)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
