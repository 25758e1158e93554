"""A checkpoint's small files, mangled byte by byte and value by value: read, or refused by a typed error; no memory for
what a file only claims to hold."""

from __future__ import annotations

import copy
import json
import random
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tenon.base.errors import TenonError
from tenon.models.generation import read_generation
from tenon.models.hf_config import read_config
from tenon.models.template import load_templates
from tenon.models.tokenizer import load_tokenizer
from tests.server.conftest import write_model

READERS: dict[str, Callable[[Path], object]] = {
    "config.json": read_config,
    "generation_config.json": lambda folder: read_generation(folder, read_config(folder)),
    "tokenizer_config.json": lambda folder: (load_templates(folder), load_tokenizer(folder)),
    "tokenizer.json": lambda folder: load_tokenizer(folder, 258).encode("hello"),
}
RICH: dict[str, dict[str, Any]] = {
    "config.json": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
        "layer_types": ["full_attention", "full_attention"],
    },
    "generation_config.json": {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "do_sample": True, "max_new_tokens": 99},
}
"""Fields besides those of the smallest sound file."""
VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**200, -(2**63), 0.5, 1e308, "", "x" * 9999, [], {}, [[]], [None] * 99,
    {"a": {"b": []}}, "\ud800",
]  # fmt: skip
WORDS = [b"{", b"[", b'"', b"0", b"9" * 40, b"-", b"1e999", b"NaN", b"null", b"\\ud800", b"\xff", b"\x00", b"[" * 5000]
MEMORY_BYTES = 512 * 2**20


def mangled(draws: random.Random, whole: bytes) -> bytes:
    """Bytes flipped, cut, doubled or replaced; or, as often, one or two values of the tree exchanged."""
    if draws.random() < 0.5:
        data = bytearray(whole)
        for _ in range(draws.randint(1, 3)):
            at = draws.randrange(len(data))
            data[at : at + draws.randrange(3)] = draws.choice([*WORDS, bytes([draws.randrange(256)])])
        return bytes(data[: draws.randrange(len(data))] if draws.random() < 0.1 else data)
    tree: Any = json.loads(whole)
    for _ in range(draws.randint(1, 2)):
        at = tree
        while True:
            key: Any = draws.choice(sorted(at) if isinstance(at, dict) else range(len(at)))
            if not isinstance(at[key], dict | list) or not at[key] or draws.random() < 0.2:
                break
            at = at[key]
        at[key] = copy.deepcopy(draws.choice(VALUES))
    return json.dumps(tree).encode()


def check(folder: Path, name: str, n: int, seed: int) -> tuple[int, int]:
    """So many mangled forms of one file; how many were read and how many refused."""
    path, draws, read, refused = folder / name, random.Random(f"{name}{seed}"), 0, 0
    whole = path.read_bytes()
    with path.open("r+b", buffering=0) as disk:  # overwritten in place: a new file each time costs a flush
        for _ in range(n):
            data = mangled(draws, whole)
            disk.seek(0)
            disk.write(data)
            disk.truncate()
            try:
                READERS[name](folder)
                read += 1
            except TenonError:
                refused += 1
    path.write_bytes(whole)
    return read, refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_model(tmp_path_factory.mktemp("sound"))
    for name, more in RICH.items():
        (made / name).write_text(json.dumps(json.loads((made / name).read_bytes()) | more))
    for reader in READERS.values():
        reader(made)
    return made


@pytest.fixture
def bounded() -> Any:
    """While inside, half a gigabyte more address space than now, and no more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is Linux's")
@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", READERS)
def test_mangled_files_are_read_or_refused(folder: Path, name: str) -> None:
    read, refused = check(folder, name, 1000, seed=0)
    assert read > 0
    assert refused > 40


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("name", READERS)
def test_many_mangled_files(folder: Path, name: str, tmp_path: Path) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    check(own, name, 50_000, seed=1)
