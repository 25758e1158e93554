"""Shapes by name: as many weights as published, or one sentence."""

from pathlib import Path

import pytest

from tenon.base.errors import ConfigError, UnsupportedModel
from tenon.models import shapes
from tenon.models.spec import CostShape, ModelSpec

KV_BYTES_PER_LAYER = {
    "Llama-3.1-8B": 4096, "Llama-3-70B": 4096, "Phi-4": 5120, "Qwen3-32B": 4096, "Qwen3-235B-A22B": 2048,
    "gpt-oss-120b": 2048, "gpt-oss-20b": 2048, "Mixtral-8x7B": 4096, "DeepSeek-V3": 1152,
}  # fmt: skip


@pytest.mark.parametrize("name", shapes.names())
def test_a_shape_has_the_published_number_of_weights(name: str) -> None:
    model = shapes.load(name)
    assert model.n_parameters() == pytest.approx(shapes.published_parameters(name), rel=0.005)
    assert shapes.source(name)
    assert model.cost.dtype == "bfloat16"


@pytest.mark.parametrize("name", KV_BYTES_PER_LAYER)
def test_a_token_keeps_the_published_bytes(name: str) -> None:
    model = shapes.load(name)
    assert model.kv_bytes_per_token(2) == model.n_layers * KV_BYTES_PER_LAYER[name]


def test_what_the_decoder_runs_is_a_spec_and_the_rest_is_known_by_its_costs() -> None:
    assert isinstance(shapes.load("Qwen3-30B-A3B"), ModelSpec)
    assert isinstance(shapes.load("DeepSeek-V3"), CostShape)


def test_active_weights_are_as_published() -> None:
    """Of Coral's table of models: what one token multiplies with."""
    for name, billions in {"Qwen3-235B-A22B": 22, "gpt-oss-120b": 5.1, "gpt-oss-20b": 3.6, "DeepSeek-V3": 37}.items():
        cost = shapes.load(name).cost
        active = cost.resident_weights + cost.n_sparse * cost.top_k * cost.expert_weights
        active += cost.vocab_size * cost.hidden_size
        assert active == pytest.approx(billions * 1e9, rel=0.05), name


def test_windows_alternate_where_the_model_has_them() -> None:
    model = shapes.load("gpt-oss-20b")
    groups = model.kv_groups("m", 16, 2)
    assert [(group.kind, group.window, len(group.layers)) for group in groups] == [
        ("window", 128, 12),
        ("full", None, 12),
    ]
    assert groups[0].block_bytes == 12 * 2048 * 16


def test_a_name_is_found_in_any_case_and_a_folder_by_its_path() -> None:
    assert shapes.find("qwen3-8b") is shapes.load("Qwen3-8B")
    embedded = shapes.find("embedded")
    assert shapes.find(str(Path(shapes.__file__).parent / "embedded" / "target")) == embedded
    assert embedded.n_layers == 12


def test_an_unknown_name_is_one_sentence_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither a folder nor a known shape 'Qwen3-7B'; did you mean .*Qwen3-8B"):
        shapes.find("Qwen3-7B")
    with pytest.raises(ConfigError, match="there are SmolLM2-135M, "):
        shapes.find("zzz")


def test_an_unknown_architecture_in_a_folder_is_the_configs_own_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(UnsupportedModel, match=r"config.json: model_type = 'mamba' is not implemented"):
        shapes.find(str(tmp_path))
