from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tenon.base.errors import CheckpointError, UnsupportedModel
from tenon.models.checkpoint import WEIGHTS, iter_tensors, load_decoder, random_decoder, save_weights
from tenon.models.decoder import Decoder
from tenon.models.hf_config import read_config
from tests.models import zoo

pytestmark = pytest.mark.torch
Saved = Callable[[str], Path]


def equal(left: Decoder, right: Decoder) -> bool:
    ours, theirs = left.state_dict(), right.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def altered(folder: Path, to: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint whose tensors went through ``change``."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, to / WEIGHTS)
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    return to


@pytest.mark.parametrize("name", ["llama-tied-llama3", "mixtral"])
def test_shards_load_like_one_file(name: str, saved: Saved, tmp_path: Path) -> None:
    zoo.checkpoint(name, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert equal(load_decoder(tmp_path), load_decoder(saved(name)))


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_fused_experts_load_like_single_ones(name: str, saved: Saved, tmp_path: Path) -> None:
    zoo.checkpoint(name, tmp_path, save_original_format=False)
    assert any(key.endswith("mlp.experts.gate_up_proj") for key in load_file(tmp_path / WEIGHTS))
    assert equal(load_decoder(tmp_path), load_decoder(saved(name)))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_any_stored_type_loads_as_any(stored: torch.dtype, wanted: torch.dtype, tmp_path: Path) -> None:
    zoo.checkpoint("qwen2", tmp_path, dtype=stored)
    weight = load_decoder(tmp_path, wanted).layers[1].out.weight
    assert torch.equal(weight, dict(iter_tensors(tmp_path))["model.layers.1.self_attn.o_proj.weight"].to(wanted))
    assert load_decoder(tmp_path).embed.weight.dtype == stored


def test_tied_weights_are_one_tensor(saved: Saved) -> None:
    decoder = load_decoder(saved("qwen2"))
    assert decoder.lm_head.weight is decoder.embed.weight


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(saved: Saved, tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor], factor: float = 1.0) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor

    load_decoder(altered(saved("qwen2"), tmp_path, add))
    with pytest.raises(CheckpointError, match="differs from the embedding"):
        load_decoder(altered(saved("qwen2"), tmp_path, lambda tensors: add(tensors, 2.0)))


def test_rotary_frequencies_of_old_checkpoints_are_passed_over(saved: Saved, tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    assert equal(load_decoder(altered(saved("llama"), tmp_path, add)), load_decoder(saved("llama")))


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(UP), f"{UP}' is missing"),
        (lambda t: t.update({UP: torch.zeros(48, 31)}), "has shape"),
        (lambda t: t.update({UP: torch.zeros(48, 32, dtype=torch.int8)}), "stored as I8"),
        (lambda t: t.update({"model.layers.1.mlp.extra": torch.zeros(1)}), "not part of a llama"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}), "not part of a llama"),
    ],
)
def test_what_does_not_fit_is_named(
    change: Callable[[dict[str, torch.Tensor]], None], said: str, saved: Saved, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=said):
        load_decoder(altered(saved("llama"), tmp_path, change))


def test_experts_in_both_layouts_are_refused(saved: Saved, tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.experts.down_proj"] = torch.zeros(8, 32, 24)

    with pytest.raises(CheckpointError, match="holds the same weights"):
        load_decoder(altered(saved("qwen3_moe"), tmp_path, add))


@pytest.mark.parametrize(
    "shard",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".safetensors", "x.bin", "", 3, "x\n.safetensors"],
)
def test_shard_names_stay_inside_the_folder(shard: object, saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved("llama") / "config.json").read_bytes())
    index = {"weight_map": {"model.norm.weight": shard}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="plain file name"):
        load_decoder(tmp_path)


def test_a_missing_shard_and_a_wrong_map_are_named(tmp_path: Path) -> None:
    zoo.checkpoint("llama", tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    shards = sorted(set(raw["weight_map"].values()))
    raw["weight_map"]["model.norm.weight"] = next(s for s in shards if s != raw["weight_map"]["model.norm.weight"])
    index.write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"has no tensor 'model.norm.weight'"):
        load_decoder(tmp_path)
    (tmp_path / shards[0]).unlink()
    with pytest.raises(CheckpointError, match=f"{shards[0]} does not exist"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused(file: str, saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved("llama") / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match="neither"):
        load_decoder(tmp_path)
    (tmp_path / file).write_bytes(b"\x80\x04.")
    with pytest.raises(UnsupportedModel, match="a pickle"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("name", zoo.ONE_EACH)
def test_saved_weights_come_back(name: str, saved: Saved, tmp_path: Path) -> None:
    decoder = load_decoder(saved(name))
    (tmp_path / "config.json").write_bytes((saved(name) / "config.json").read_bytes())
    save_weights(decoder, decoder.spec, tmp_path)
    assert equal(load_decoder(tmp_path), decoder)
    tokens = zoo.prompts(1, 9)
    with torch.no_grad():
        theirs = zoo.load_reference(tmp_path, torch.float32)(tokens).logits[0]
        torch.testing.assert_close(decoder(tokens[0], torch.arange(9)), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", zoo.ONE_EACH)
def test_random_weights_depend_on_the_seed_alone(name: str, saved: Saved) -> None:
    spec = read_config(saved(name))
    first, again, other = (random_decoder(spec, seed, torch.float32) for seed in (1, 1, 2))
    assert equal(first, again)
    assert not equal(first, other)
    with torch.no_grad():
        spread = first(zoo.prompts(1, 30)[0], torch.arange(30)).std()
    assert 0.5 < spread < 2.0


@pytest.mark.parametrize("name", ["llama", "llama-tied-llama3"])
def test_a_decoder_that_was_saved_alone(name: str, saved: Saved, tmp_path: Path) -> None:
    def alone(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop("lm_head.weight", None)
        for full in list(tensors):
            tensors[full.removeprefix("model.")] = tensors.pop(full)

    whole, made = load_decoder(saved(name)), load_decoder(altered(saved(name), tmp_path, alone))
    assert made.has_head is whole.spec.tie_embeddings
    assert made.spec == whole.spec
    ours, theirs = dict(made.named_parameters()), dict(whole.named_parameters())
    assert ours.keys() == theirs.keys() - ({"lm_head.weight"} if not made.has_head else set())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert made.lm_head.weight is made.embed.weight


def test_a_decoder_alone_may_have_an_output_layer_and_must_have_all_else(saved: Saved, tmp_path: Path) -> None:
    def alone(tensors: dict[str, torch.Tensor]) -> None:
        for full in list(tensors):
            tensors[full.removeprefix("model.")] = tensors.pop(full)

    folder = altered(saved("llama"), tmp_path, alone)
    assert equal(load_decoder(folder), load_decoder(saved("llama")))
    altered(folder, folder, lambda tensors: tensors.pop("norm.weight"))
    with pytest.raises(CheckpointError, match=r"'norm\.weight' is missing"):
        load_decoder(folder)
