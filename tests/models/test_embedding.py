"""What sentence-transformers keeps beside a checkpoint, as it is found on hubs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tenon.base.errors import CheckpointError
from tenon.models.embedding import EmbeddingSpec, read_embedding
from tenon.models.spec import ModelSpec

SPEC = ModelSpec("llama", 128, 32, 2, 4, 2, 8, 64, 256)
FLAGS = (
    "pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_max_tokens",
    "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken",
)  # fmt: skip


def write(folder: Path, kinds: list[str], pooling: dict[str, Any] | None = None) -> Path:
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def flags(*on: str) -> dict[str, Any]:
    """A pooling's file as sentence-transformers writes it."""
    return {"word_embedding_dimension": 32, "include_prompt": True} | {name: name in on for name in FLAGS}


def test_any_decoder_is_embedded_by_its_last_token(tmp_path: Path) -> None:
    assert read_embedding(tmp_path, SPEC) == EmbeddingSpec(32, "last", normalize=True)


@pytest.mark.parametrize(
    ("pooling", "name"),
    [
        (flags("pooling_mode_lasttoken"), "last"),
        (flags("pooling_mode_mean_tokens"), "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_poolings_that_are_implemented(tmp_path: Path, pooling: dict[str, Any], name: str) -> None:
    folder = write(tmp_path, ["Transformer", "Pooling", "Normalize"], pooling)
    assert read_embedding(folder, SPEC) == EmbeddingSpec(32, name, normalize=True)


def test_without_a_normalisation_there_is_none(tmp_path: Path) -> None:
    folder = write(tmp_path, ["Transformer", "Pooling"], flags("pooling_mode_mean_tokens"))
    assert read_embedding(folder, SPEC) == EmbeddingSpec(32, "mean", normalize=False)


@pytest.mark.parametrize(
    ("kinds", "pooling", "said"),
    [
        (["Transformer", "Pooling"], flags("pooling_mode_cls_token"), "pools by pooling_mode_cls_token"),
        (["Transformer", "Pooling"], flags("pooling_mode_lasttoken", "pooling_mode_max_tokens"), "max_tokens, "),
        (["Transformer", "Pooling"], flags(), "pools by nothing"),
        (["Transformer", "Pooling"], {"pooling_mode": "cls"}, "pools by cls"),
        (["Transformer", "Pooling", "Dense"], flags("pooling_mode_lasttoken"), "a module 'Dense'"),
        (["Transformer", "Normalize", "Pooling"], None, "a module 'Normalize'"),
    ],
)
def test_what_is_not_implemented_is_a_refusal(
    tmp_path: Path, kinds: list[str], pooling: dict[str, Any] | None, said: str
) -> None:
    assert said in str(read_embedding(write(tmp_path, kinds, pooling), SPEC).refusal)


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", '[{"type": "Pooling"}]', '[{"type": "x.Pooling", "path": "../x"}]', "[NaN]", "[", "[]}"],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        read_embedding(tmp_path, SPEC)


def test_a_missing_pooling_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="1_Pooling"):
        read_embedding(write(tmp_path, ["Transformer", "Pooling"]), SPEC)
