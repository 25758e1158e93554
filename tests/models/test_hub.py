from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tenon.base.errors import CheckpointError, ConfigError
from tenon.models.hub import NESTED, WANTED, resolve


def test_a_folder_is_itself(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)) == tmp_path
    with pytest.raises(ConfigError, match="is a file"):
        resolve(str(tmp_path / "config.json"))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a b", "../x/y", "a/b/c", ""])
def test_what_is_neither_folder_nor_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        resolve(name)


def test_a_hub_name_without_a_network_gives_one_sentence(tmp_path: Path) -> None:
    program = "from tenon.models.hub import resolve; resolve('nobody/nothing')"
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False)
    assert "ResourceError: cannot fetch 'nobody/nothing'" in done.stderr


def test_of_folders_inside_a_repository_only_what_says_how_to_embed_is_fetched() -> None:
    utils = pytest.importorskip("huggingface_hub.utils")
    there = [
        "config.json", "model.safetensors", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors",
        "onnx/config.json", "onnx/model.safetensors", "8bit/config.json", "original/x.json", "a/1_Pooling/config.json",
        "model.py", "pytorch_model.bin",
    ]  # fmt: skip
    fetched = utils.filter_repo_objects(there, allow_patterns=list(WANTED), ignore_patterns=list(NESTED))
    assert list(fetched) == ["config.json", "model.safetensors", "modules.json", "1_Pooling/config.json"]
