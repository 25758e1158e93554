"""Goals are checked when they are stated; memory is planned before it is taken."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from tenon.base.errors import ConfigError, RequestError
from tenon.engine.build import plan_memory
from tenon.engine.config import EngineConfig
from tenon.engine.params import SamplingParams
from tenon.models.spec import ModelSpec

SPEC = ModelSpec("llama", 100, 64, 4, 4, 2, 16, 96, 2048)
GROUPS = SPEC.kv_groups("m", 16, 2)
BLOCK = 2 * 4 * 32 * 2 * 16


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("executor", "magic"),
        ("dtype", "int3"),
        ("numerics", "exact"),
        ("block_tokens", 17),
        ("evict", "mru"),
        ("reuse", "suffix"),
        ("pending", "maybe"),
        ("chunk", "half"),
        ("tpot_ms", 0.0),
        ("tpot_ms", float("nan")),
        ("step_ms", 0.0),
        ("step_ms", 5.0),  # without the hash executor
        ("min_chunk_tokens", 0),
        ("max_step_tokens", 0),
        ("max_sequences", 0),
        ("max_waiting", -1),
        ("max_preemptions", -1),
        ("kv_bytes", 0),
        ("max_model_len", 0),
        ("threads", 0),
    ],
)
def test_a_wrong_setting_is_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field) as refused:
        EngineConfig(**{field: value})
    assert refused.value.subject == field
    assert repr(value) in str(refused.value)


def test_configs_do_not_change_and_resolve_to_new_ones() -> None:
    config = EngineConfig()
    with pytest.raises(FrozenInstanceError):
        config.model = "other"  # type: ignore[misc]
    assert config.resolve(kv_bytes=5).kv_bytes == 5
    assert config.kv_bytes is None
    with pytest.raises(ConfigError, match="kv_bytes"):
        config.resolve(kv_bytes=-1)


def test_memory_asked_for_is_what_is_planned() -> None:
    plan = plan_memory(EngineConfig(kv_bytes=10 * BLOCK + 5), SPEC, GROUPS, 0)
    assert (plan.n_blocks, plan.tokens, plan.kv_bytes, plan.max_model_len) == (10, 144, 10 * BLOCK, 144)


def test_memory_left_open_is_no_more_than_could_be_used_nor_than_is_free() -> None:
    most = plan_memory(EngineConfig(max_sequences=3), SPEC, GROUPS, 2**40)
    assert most.n_blocks == 3 * 128 + 1
    assert most.max_model_len == 2048
    tight = plan_memory(EngineConfig(max_sequences=3), SPEC, GROUPS, 100 * BLOCK)
    assert tight.n_blocks == 60


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"kv_bytes": BLOCK}, "at least 2 are needed"),
        ({"kv_bytes": 10 * BLOCK, "max_model_len": 500}, "lower max_model_len to 144 or raise kv_bytes to"),
    ],
)
def test_memory_that_is_not_there_is_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan_memory(EngineConfig(**config), SPEC, GROUPS, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", -1),
        ("top_k", -2),
        ("top_k", 1.5),
        ("n", 0),
        ("n", 65),
        ("max_tokens", 0),
        ("seed", 2**64),
        ("logprobs", 21),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("stop_token_ids", (-1,)),
        ("ignore_eos", "yes"),
        ("speculative", 0),
        ("speculative", "suffix"),
    ],
)
def test_a_wrong_wish_is_named(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=field) as refused:
        SamplingParams(**{field: value})
    assert refused.value.param == field


def test_wishes_are_checked_again_when_changed() -> None:
    params = SamplingParams(stop="\n", stop_token_ids=[3])  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids) == (("\n",), (3,))
    assert params.with_(n=2).n == 2
    with pytest.raises(RequestError):
        params.with_(n=0)
