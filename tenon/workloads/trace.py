"""Request traces: what arrives when, how long it is, and what of it is shared with what came before.

A prompt is a list of *segments*, runs of tokens of some content: two prompts that begin with the same segments begin
with the same tokens, so prefix reuse needs no text. The tokens of a content follow from its number alone
(:func:`content_tokens`). An output is a content too, so that a later turn can contain it.

A file holds one JSON object a line: first ``{"kind": "trace", "version": 1, ...}``, then one request each. Equal
traces give equal bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from tenon.base import files
from tenon.base.errors import ConfigError

VERSION = 1


class Segment(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The first ``n`` tokens of ``content``."""

    content: int
    n: int


class TraceRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request.

    ``arrival_s`` counts from the trace's start. A request with ``after`` is sent ``gap_s`` seconds after that request
    has ended (a tool ran, a person read and wrote): its ``arrival_s`` is an estimate, for whoever looks at a trace
    without running it. ``output`` is the content that is answered, 0 where nothing refers to it.
    """

    id: str
    arrival_s: float
    prompt: tuple[Segment, ...]
    n_output: int
    output: int = 0
    after: str = ""
    gap_s: float = 0.0
    session: str = ""
    turn: int = 0
    slo_class: str = ""
    tenant: str = ""

    @property
    def n_prompt(self) -> int:
        """Tokens of the prompt."""
        return sum(segment.n for segment in self.prompt)


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="trace", tag_field="kind"):
    """What a trace is and where it comes from. ``parameters`` holds what a generator was given, with its seed."""

    version: int
    name: str
    source: str
    parameters: dict[str, Any] = {}


class Trace(msgspec.Struct, frozen=True):
    """Requests in the order of their arrival."""

    header: Header
    requests: tuple[TraceRequest, ...]

    @classmethod
    def make(cls, name: str, source: str, requests: Iterable[TraceRequest], /, **parameters: Any) -> Self:
        """Sorted and checked. Raises ``ConfigError`` naming the request and the field."""
        made = cls(Header(VERSION, name, source, parameters), tuple(sorted(requests, key=lambda r: r.arrival_s)))
        check(made.requests, name, first_line=2)
        return made

    @property
    def duration_s(self) -> float:
        """From the start to the last arrival."""
        return self.requests[-1].arrival_s if self.requests else 0.0


def check(requests: Iterable[TraceRequest], where: str, first_line: int = 1) -> None:
    """Raises ``ConfigError`` for the first request that cannot be: the line, the field, the value, what would be
    right.
    """

    def wrong(line: int, field: str, value: object, right: str) -> ConfigError:
        return ConfigError(f"{where} line {line}: {field} must be {right}, got {value!r}", subject=where)

    seen: dict[str, float] = {}
    for line, r in enumerate(requests, first_line):
        if not r.id or r.id in seen:
            raise wrong(line, "id", r.id, "set, and the trace's only one of its name")
        if not (math.isfinite(r.arrival_s) and r.arrival_s >= 0):
            raise wrong(line, "arrival_s", r.arrival_s, "at least 0")
        if not (math.isfinite(r.gap_s) and r.gap_s >= 0):
            raise wrong(line, "gap_s", r.gap_s, "at least 0")
        if r.n_output < 1:
            raise wrong(line, "n_output", r.n_output, "at least 1")
        if not r.prompt or any(s.n < 1 or s.content < 0 for s in r.prompt):
            raise wrong(line, "prompt", [tuple(s) for s in _pairs(r.prompt)], "segments (content >= 0, tokens >= 1)")
        if r.after and r.after not in seen:
            raise wrong(line, "after", r.after, "the id of an earlier request")
        if r.after and seen[r.after] > r.arrival_s:
            raise wrong(line, "arrival_s", r.arrival_s, f"no earlier than that of {r.after!r}")
        seen[r.id] = r.arrival_s


def _pairs(prompt: tuple[Segment, ...]) -> list[tuple[int, int]]:
    return [(s.content, s.n) for s in prompt]


_encoder = msgspec.json.Encoder()
_header = msgspec.json.Decoder(Header)
_request = msgspec.json.Decoder(TraceRequest)


def dump(trace: Trace) -> bytes:
    """The trace as a file's bytes."""
    return b"".join(_encoder.encode(part) + b"\n" for part in (trace.header, *trace.requests))


def save(trace: Trace, path: Path) -> None:
    """Write atomically. Raises ``ResourceError``."""
    files.write_bytes(path, dump(trace))


def load(path: Path) -> Trace:
    """Read a trace that :func:`save` wrote. Raises ``ConfigError`` naming line and field."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}", subject=str(path)) from error
    header = _decode(_header, lines[0] if lines else b"", path, 1)
    if header.version != VERSION:
        raise ConfigError(
            f"{path} is a trace of version {header.version}; this reader knows {VERSION}", subject=str(path)
        )
    requests = tuple(_decode(_request, line, path, number) for number, line in enumerate(lines[1:], 2))
    check(requests, str(path), first_line=2)
    if any(a.arrival_s > b.arrival_s for a, b in itertools.pairwise(requests)):
        raise ConfigError(f"{path}: requests must stand in the order of arrival_s", subject=str(path))
    return Trace(header, requests)


T = TypeVar("T")


def _decode(decoder: msgspec.json.Decoder[T], line: bytes, path: Path, number: int) -> T:
    try:
        return decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} line {number}: {error}", subject=str(path)) from error


def content_tokens(content: int, n: int, vocab_size: int, first: int = 0) -> NDArray[np.int32]:
    """(n,) token ids in [first, vocab_size): a function of ``content`` alone, longer runs begin with shorter ones."""
    generator = np.random.Generator(np.random.Philox(key=content))
    # Raw words, not bounded draws: those may reject, and a prefix must not depend on its length.
    words = generator.integers(0, 2**32, n, dtype=np.uint32)
    return (first + (words.astype(np.uint64) * np.uint64(vocab_size - first) >> np.uint64(32))).astype(np.int32)


def prompt_tokens(request: TraceRequest, vocab_size: int, first: int = 0) -> NDArray[np.int32]:
    """(n_prompt,) token ids of the whole prompt."""
    return np.concatenate([content_tokens(s.content, s.n, vocab_size, first) for s in request.prompt])
