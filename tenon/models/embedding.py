"""How a checkpoint wants its embeddings made: the files that sentence-transformers keeps beside it.

``modules.json`` lists the steps after the decoder: a pooling, perhaps a normalisation. A checkpoint without it is any
decoder; of one the last token's state stands for the text, of length one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tenon.base.errors import CheckpointError
from tenon.models.metadata import parse_object, read_bytes, read_object
from tenon.models.spec import ModelSpec

MODULES: Final = "modules.json"
POOLINGS: Final = ("last", "mean")
_MODES: Final = {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}


@dataclass(frozen=True)
class EmbeddingSpec:
    """``width``: of the whole vector. ``refusal``: why there are no embeddings of this model; None: there are."""

    width: int
    pooling: str = "last"
    normalize: bool = True
    refusal: str | None = None


def read_embedding(folder: Path, spec: ModelSpec) -> EmbeddingSpec:
    """Of the checkpoint in ``folder``. What is asked for and not implemented is a ``refusal``, for the model may still
    generate. Raises ``CheckpointError`` for a file that is damaged."""
    path = folder / MODULES
    if not path.exists():
        return EmbeddingSpec(spec.hidden_size)
    pooling, normalize = None, False
    for kind, place in _modules(path):
        if kind == "Transformer":
            continue
        if kind == "Normalize" and pooling is not None:
            normalize = True
        elif kind == "Pooling" and pooling is None:
            pooling, refusal = _pooling(folder / place / "config.json")
            if pooling is None:
                return EmbeddingSpec(spec.hidden_size, refusal=refusal)
        else:
            said = f"{path.name} has a module {kind!r} here; implemented are Transformer, Pooling and Normalize"
            return EmbeddingSpec(spec.hidden_size, refusal=said)
    return EmbeddingSpec(spec.hidden_size, pooling or "last", normalize)


def _modules(path: Path) -> list[tuple[str, str]]:
    """Kind and folder of each, in order."""
    # A list is no object, and only objects are read strictly.
    raw = parse_object(b'{"modules": ' + read_bytes(path) + b"}", str(path))["modules"]
    found: list[tuple[str, str]] = []
    for module in raw if isinstance(raw, list) else [None]:
        kind, place = (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
        if not isinstance(kind, str) or not isinstance(place, str) or Path(place).is_absolute() or ".." in place:
            shown = json.dumps(module)[:80]
            raise CheckpointError(
                f"{path}: it must list modules with a type and a path within the checkpoint, not {shown}",
                subject=MODULES,
            )
        found.append((kind.rpartition(".")[2], place))
    return found


def _pooling(path: Path) -> tuple[str | None, str]:
    """The pooling, or None and why not."""
    raw: dict[str, Any] = read_object(path)
    named = raw.get("pooling_mode")  # newer files name it; older ones have a flag for each
    chosen = [named] if isinstance(named, str) else [k for k, on in raw.items() if k.startswith("pooling_mode_") and on]
    modes = _MODES | {"lasttoken": "last", "mean": "mean"}
    if len(chosen) != 1 or chosen[0] not in modes:
        said = ", ".join(chosen) if chosen else "nothing"
        return None, f"its {path.parent.name}/{path.name} pools by {said}; implemented are lasttoken and mean_tokens"
    return modes[chosen[0]], ""
