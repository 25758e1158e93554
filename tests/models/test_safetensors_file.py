from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tenon.base.errors import CheckpointError
from tenon.models.safetensors_file import SafetensorsFile, write_safetensors

pytestmark = pytest.mark.torch


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 5, generator=generator),
        "b": torch.randn(7, generator=generator).bfloat16(),
        "c": torch.randn(2, 2, 2, generator=generator).half(),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
        "ids": torch.arange(6, dtype=torch.int64),
    }


def write(path: Path, header: Any, body: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.safetensors", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert same({name: file.tensor(name) for name in file.entries}, tensors())
    assert file.metadata == {"format": "pt"}


def test_the_library_reads_what_it_writes(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x.safetensors", tensors() | {"t": torch.ones(4, 3).t()})
    assert same(load_file(tmp_path / "x.safetensors"), tensors() | {"t": torch.ones(3, 4)})
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_views_outlive_the_file(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.safetensors")
    view = SafetensorsFile(tmp_path / "x.safetensors").tensor("a")
    (tmp_path / "x.safetensors").unlink()
    assert torch.equal(view, tensors()["a"])


def test_an_unaligned_tensor_is_read_right(tmp_path: Path) -> None:
    body = b"\x01" + torch.tensor([1.5, 2.5]).numpy().tobytes()
    header = {
        "flag": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    assert SafetensorsFile(write(tmp_path / "x", header, body)).tensor("x").tolist() == [1.5, 2.5]


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"x": entry(shape=[3])}, "need 12"),
        ({"x": entry(offsets=[8, 0])}, "a start and an end"),
        ({"x": entry(offsets=[0, 16], shape=[4])}, "cut short"),
        ({"x": entry(offsets=[0, 4], shape=[1])}, "too long"),
        ({"x": entry(offsets=[-8, 0])}, "a start and an end"),
        ({"x": entry(offsets=[0, True])}, "a start and an end"),
        ({"x": entry(offsets=[0, 8, 8])}, "a start and an end"),
        ({"x": entry(shape=[-2])}, "shape"),
        ({"x": entry(shape=[2.0])}, "shape"),
        ({"x": entry(shape=[1] * 100)}, "shape"),
        ({"x": entry(shape=[2**62, 2**62, 4])}, "need"),
        ({"x": entry(dtype="F4")}, "type"),
        ({"x": entry(dtype=["F32"])}, "type"),
        ({"x": entry() | {"more": 1}}, "exactly"),
        ({"x": 3}, "exactly"),
        ({"x": entry(), "y": entry()}, "overlaps"),
        ({"x": entry(shape=[1], offsets=[4, 8])}, "gap"),
        ({"__metadata__": {"a": 1}, "x": entry()}, "__metadata__"),
        (b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "x": 1}', "stands twice"),
        (b"[]", "JSON object"),
        (b'{"x": ', "cut short"),
        (b"", "JSON object"),
    ],
)
def test_a_wrong_header_is_refused_with_one_sentence(tmp_path: Path, header: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        SafetensorsFile(write(tmp_path / "x.safetensors", header, bytes(8)))
    assert "x.safetensors" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\x01\x02", b"\xff" * 8, (1 << 40).to_bytes(8, "little") + b"{}"])
def test_a_wrong_length_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CheckpointError):
        SafetensorsFile(tmp_path / "x")


def test_every_cut_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path)
    for n in reversed(range(path.stat().st_size)):
        os.truncate(path, n)
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)


def test_mutated_headers_are_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path)
    whole = path.read_bytes()
    n_header = 8 + int.from_bytes(whole[:8], "little")
    rng, refused = random.Random(0), 0
    with path.open("r+b", buffering=0) as disk:  # overwritten in place: truncating flushes on some file systems
        for _ in range(2000):
            mutated = bytearray(whole[:n_header])
            for _ in range(rng.randint(1, 3)):
                at = rng.randrange(n_header)
                flipped = mutated[at] ^ 1 << rng.randrange(8)
                mutated[at] = rng.choice([rng.randrange(256), flipped, ord(rng.choice('09"-,[]{'))])
            disk.seek(0)
            disk.write(mutated)
            try:
                file = SafetensorsFile(path)
            except CheckpointError:
                refused += 1
                continue
            for name in file.entries:
                file.tensor(name).to(torch.float32).sum()
    assert refused > 1000
