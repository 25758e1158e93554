"""Reading and writing one safetensors file.

The layout: eight bytes of header length (little endian), a JSON header that gives each tensor's type, shape and byte
range, then the bytes. Nothing of it is trusted: every number is checked against the file's size in Python integers
before a byte is mapped, and the ranges must tile the rest of the file, without gap or overlap, as the format demands.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tenon.base.errors import CheckpointError, ResourceError
from tenon.models.metadata import parse_object

MAX_HEADER_BYTES: Final = 100_000_000
MAX_DIMENSIONS: Final = 16

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16,
    "U32": torch.uint32, "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: bytes ``[start, end)``, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """An open file: checked entries, and tensors that are views over its read-only mapping.

    A view stays valid as long as it lives, also after this object is gone, and must not be written to. Raises
    ``CheckpointError`` naming file and tensor for whatever is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.entries, self.metadata = _read_header(file.read(8), size, lambda n: file.read(n), str(path))
                # Python keeps its own descriptor for the mapping.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} does not exist", subject=str(path)) from error
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}", subject=str(path)) from error

    def tensor(self, name: str) -> Tensor:
        """The tensor as a view; ``KeyError`` when the file has none of that name."""
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        if entry.start % dtype.itemsize:  # unaligned reads are undefined: a copy lies where it should
            raw = _view(self._map, torch.uint8, entry.end - entry.start, entry.start).clone()
            return raw.view(dtype).view(entry.shape)
        return _view(self._map, dtype, math.prod(entry.shape), entry.start).view(entry.shape)


def _view(mapping: mmap.mmap, dtype: torch.dtype, count: int, offset: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)
        return torch.frombuffer(mapping, dtype=dtype, count=count, offset=offset)


def _read_header(head: bytes, size: int, read: Any, where: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries in byte order and the free-form metadata. ``read(n)`` gives the n bytes after ``head``."""
    if len(head) < 8:
        raise CheckpointError(f"{where} has {size} bytes; a safetensors file has at least 8", subject=where)
    n = int.from_bytes(head, "little")
    if n > MAX_HEADER_BYTES or 8 + n > size:
        raise CheckpointError(
            f"{where} claims a header of {n} bytes; the file has {size} and at most {MAX_HEADER_BYTES} are read",
            subject=where,
        )
    data = read(n)
    if len(data) != n or not data.startswith(b"{"):
        raise CheckpointError(f"{where} is damaged: its header does not start with a JSON object", subject=where)
    raw = parse_object(data, f"{where} (header)")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ must map names to strings", subject=where)
    entries = sorted((_entry(name, item, 8 + n, where) for name, item in raw.items()), key=lambda e: (e.start, e.end))
    at = 8 + n
    for entry in entries:
        if entry.start != at:
            what = "overlaps the tensor before it" if entry.start < at else "leaves a gap before it"
            raise CheckpointError(
                f"{where}: tensor {entry.name!r} starts at byte {entry.start} where {at} is right: it {what}",
                subject=entry.name,
            )
        at = entry.end
    if at != size:
        raise CheckpointError(
            f"{where} is {'cut short' if at > size else 'too long'}: its tensors end at byte {at}, the file at {size}",
            subject=where,
        )
    return {entry.name: entry for entry in entries}, metadata


def _entry(name: str, item: Any, base: int, where: str) -> Entry:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{where}: tensor {name[:200]!r} {what}", subject=name)

    if not isinstance(item, dict) or item.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong("must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise wrong(f"has type {dtype!r:.40}; known are {', '.join(DTYPES)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise wrong(f"has shape {shape!r:.80}; it must be at most {MAX_DIMENSIONS} sizes")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong(f"has data_offsets {offsets!r:.80}; they must be a start and an end")
    need, start, end = math.prod(shape) * DTYPES[dtype].itemsize, offsets[0], offsets[1]
    if end - start != need:
        raise wrong(f"has {end - start} bytes; type {dtype} and shape {shape} need {need}")
    return Entry(name, dtype, tuple(shape), base + start, base + end)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write ``tensors`` (any device, any strides) to ``path`` in one rename: the file is whole or absent.

    ``dtype`` converts them on the way; ``None`` keeps each one's own. Memory is one tensor at a time. Raises
    ``ResourceError`` when the disk refuses.
    """
    kinds = {name: dtype or tensor.dtype for name, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    # Wide types first, so that every tensor is aligned to its own size.
    order = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))
    for name in order:
        shape = list(tensors[name].shape)
        end = at + math.prod(shape) * kinds[name].itemsize
        header[name] = {"dtype": NAMES[kinds[name]], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.part")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                flat = tensors[name].detach().to("cpu", kinds[name]).contiguous().view(-1)
                file.write(flat.view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResourceError(f"cannot write {path}: {error.strerror or error}", subject=str(path)) from error


SHARD_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
"""What an index may call a shard: a plain name, so that it stays inside the folder."""
