from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tenon.base.errors import CheckpointError
from tenon.models.generation import GenerationDefaults, parse_generation, read_generation
from tenon.models.spec import ModelSpec

SPEC = ModelSpec(
    family="llama", vocab_size=100, hidden_size=8, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=8,
    intermediate_size=8, max_position=64, eos_ids=(2,),
)  # fmt: skip


def test_recommendations_are_honoured() -> None:
    raw = {
        "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "max_new_tokens": 512,
        "eos_token_id": [7, 9, 7], "pad_token_id": 0, "transformers_version": "5.0", "repetition_penalty": 1.05,
        "num_beams": 1, "typical_p": None, "_from_model_config": True,
    }  # fmt: skip
    found = parse_generation(raw, SPEC)
    assert found == GenerationDefaults(0.6, 20, 0.95, 0.01, 1.05, 512, (7, 9), ())
    assert found.sampling() == {
        "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.05,
    }  # fmt: skip


def test_what_is_not_said_is_left_open() -> None:
    found = parse_generation({"eos_token_id": 5}, SPEC)
    assert (found.sampling(), found.eos_ids) == ({}, (5,))
    assert parse_generation({}, SPEC).eos_ids == (2,)


def test_no_sampling_is_greedy() -> None:
    assert parse_generation({"do_sample": False, "temperature": 0.7}, SPEC).temperature == 0.0
    assert parse_generation({"temperature": 0.7}, SPEC).temperature == 0.7


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_beams", 4), ("typical_p", 0.9), ("no_repeat_ngram_size", 3), ("suppress_tokens", [3]), ("brand_new", 1)],
)
def test_what_changes_the_tokens_and_is_not_there_is_reported(name: str, value: Any) -> None:
    (warning,) = parse_generation({name: value}, SPEC).warnings
    assert name in warning
    assert str(value) in warning


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", -1),
        ("top_p", 0),
        ("top_k", 2.5),
        ("eos_token_id", 100),
        ("do_sample", 1),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=name):
        parse_generation({name: value}, SPEC)


def test_from_a_folder(tmp_path: Path) -> None:
    assert read_generation(tmp_path, SPEC) == GenerationDefaults(eos_ids=(2,))
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 3}))
    assert read_generation(tmp_path, SPEC).top_k == 3
    (tmp_path / "generation_config.json").write_text('{"top_k"')
    with pytest.raises(CheckpointError, match="cut short"):
        read_generation(tmp_path, SPEC)
