"""A run's state in one safetensors file: weights, optimizer, data cursor, written in one rename."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from tenon.base.errors import CheckpointError
from tenon.models.safetensors_file import SafetensorsFile, write_safetensors
from tenon.training.rows import Cursor


@dataclass(frozen=True)
class Progress:
    """How far a run has come; ``cpu_s`` are the training thread's own seconds over all sittings."""

    iteration: int = 0
    tokens: int = 0
    cpu_s: float = 0.0
    cursor: Cursor = Cursor()


def save(path: Path, weights: dict[str, Tensor], optimizer: dict[str, Tensor], progress: Progress) -> None:
    """Write all or nothing: a crash leaves the file of before. Raises ``ResourceError`` when the disk refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"model/{k}": v.detach() for k, v in weights.items()}
    tensors |= {f"optimizer/{k}": v.detach() for k, v in optimizer.items()}
    write_safetensors(path, tensors, {"progress": json.dumps(asdict(progress))})


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], Progress]:
    """Weights, optimizer state, progress. Raises ``CheckpointError`` naming the file when it is damaged."""
    file = SafetensorsFile(path)
    try:
        saved = json.loads(file.metadata["progress"])
        progress = Progress(**{**saved, "cursor": Cursor(**saved["cursor"])})
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not a state of a training run: {error!r}.", subject=str(path)) from error
    tensors = {name: file.tensor(name).clone() for name in file.entries}
    weights = {k.removeprefix("model/"): v for k, v in tensors.items() if k.startswith("model/")}
    optimizer = {k.removeprefix("optimizer/"): v for k, v in tensors.items() if k.startswith("optimizer/")}
    return weights, optimizer, progress
