"""The small JSON files beside a model's weights, read strictly: they come from strangers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, Final, NoReturn

from tenon.base.errors import CheckpointError

MAX_BYTES = 256 << 20
"""The largest tokenizer.json in the wild is below 40 MB."""


_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
"""The escape of half a character; two of them in a row may be a whole one."""


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers of one file may disagree on which of two equal keys counts."""
    seen = dict(pairs)
    if len(seen) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice in one object")
    return seen


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large for a number")
    return value


def _is_unicode(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in ``data``; ``where`` names its file in errors.

    Raises ``CheckpointError`` for what is not UTF-8, not JSON, not an object, holds NaN or an infinity, repeats a key,
    has half a character or nests without end.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where} is not UTF-8 at byte {error.start}", subject=where) from error
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{where} is damaged or cut short: {error.msg} at line {error.lineno}, column {error.colno}", subject=where
        ) from error
    except (ValueError, RecursionError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{where} is not usable JSON: {reason}", subject=where) from error
    if _SURROGATE.search(data) and not _is_unicode(value):
        raise CheckpointError(f"{where} is not usable JSON: it has half a character, a lone surrogate", subject=where)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} holds a JSON {type(value).__name__}, not an object", subject=where)
    return value


def read_bytes(path: Path) -> bytes:
    """The bytes of a small file. Raises ``CheckpointError`` when it is missing, unreadable or above ``MAX_BYTES``."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{path} has {size} bytes; at most {MAX_BYTES} are read", subject=str(path))
        return path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist", subject=str(path)) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}", subject=str(path)) from error


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; see :func:`parse_object` and :func:`read_bytes` for what is refused."""
    return parse_object(read_bytes(path), str(path))


def token_id(value: Any, name: str, where: str, vocab_size: int) -> int:
    """A token id below ``vocab_size``, or ``CheckpointError`` naming the field and the file."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < vocab_size:
        raise CheckpointError(
            f"{where}: {name} is {str(value)[:80]!r}; it must be a token id from 0 to {vocab_size - 1}", subject=name
        )
    return value


def token_ids(value: Any, name: str, where: str, vocab_size: int) -> tuple[int, ...]:
    """One id, a list of ids or ``None`` (no ids), in the given order, without repeats."""
    if value is None:
        return ()
    many = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(token_id(item, name, where, vocab_size) for item in many))
