"""The work of a step: equal to what is computed by hand from a model's shapes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.base.errors import ConfigError
from tenon.cost.work import Phase, StepShape, Work, decode_shape, prefill_shape, spans_shape
from tenon.models import shapes
from tenon.models.spec import ModelSpec, MoeSpec, step_work

TINY = ModelSpec("llama", 100, 8, 2, 4, 2, 4, 16, 64, dtype="float32")
MIXED = dataclasses.replace(TINY, family="qwen3_moe", moe=MoeSpec(8, 2, 6, True, (1,)))
WINDOWED = dataclasses.replace(TINY, family="mistral", windows=(None, 5))


def phase(work: Work, kind: str) -> Phase:
    return next(p for p in work.phases if p.kind == kind)


def test_every_phase_of_a_tiny_model_by_hand() -> None:
    work = step_work(TINY, prefill_shape(10, 3))
    qkv, out, mlp = 8 * (16 + 2 * 8), 16 * 8, 3 * 8 * 16
    weights = 2 * (qkv + out + mlp)
    assert phase(work, "linear").flops == 2 * weights * 3
    assert phase(work, "linear").bytes == 4 * weights
    assert phase(work, "attention").flops == 2 * (4 * 16) * (11 + 12 + 13)
    kv = 2 * 2 * 8 * 4 * (13 + 3)  # two layers of K and V: 13 positions read, 3 written
    assert phase(work, "attention").bytes == kv + 2 * 2 * 32 * 4 * 3
    assert phase(work, "logits").flops == 2 * 8 * 100
    per_row = 2 * (12 * 8 + 4 * 32 + 6 * 16)  # hidden, q k v and gates, in and out of what reads and writes them
    assert phase(work, "rowwise").bytes == 4 * (3 * per_row + 2 * 100 + 8)
    assert phase(work, "logits").bytes == 4 * 8 * 100
    assert phase(work, "linear").launches + phase(work, "attention").launches == 2 * 5
    assert (work.rows, work.spans, work.outputs, work.dtype) == (3, 1, 1, "float32")


@pytest.mark.parametrize("name", ["SmolLM2-135M", "Llama-3.1-8B", "Qwen3-32B", "Phi-4"])
@pytest.mark.parametrize("rows", [1, 17, 512])
def test_a_dense_models_total_is_two_flops_a_weight_and_row_and_four_a_pair(name: str, rows: int) -> None:
    model = shapes.load(name)
    work = step_work(model, prefill_shape(100, rows, outputs=rows))
    cost = model.cost
    in_products = model.n_parameters() - cost.small_weights
    in_products -= 0 if cost.tie_embeddings else cost.vocab_size * cost.hidden_size  # looked up, not multiplied
    pairs = sum(range(101, 101 + rows))
    assert work.flops == pytest.approx(2 * in_products * rows + cost.n_layers * cost.pair_flops * pairs)


def test_decoding_one_row_reads_every_weight_but_the_unused_embeddings() -> None:
    model = shapes.load("Llama-3.1-8B")
    work = step_work(model, decode_shape([1]))
    embedding = 128256 * 4096 * 2
    assert work.bytes == pytest.approx(model.weights_bytes() - embedding, rel=1e-3)


def test_keys_and_values_are_read_once_a_span() -> None:
    model = shapes.load("Llama-3.1-8B")
    base, more = (step_work(model, StepShape(1, 1, 1, (n,), (n,))) for n in (1000, 1001))
    assert more.bytes - base.bytes == 32 * 4096
    assert more.flops - base.flops == 32 * 4 * 4096


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_experts_are_read_as_often_as_rows_are_expected_to_choose_them(rows: int) -> None:
    work = step_work(MIXED, prefill_shape(0, rows))
    expert, distinct = 3 * 8 * 6, 8 * (1 - (1 - 2 / 8) ** rows)
    one = phase(work, "experts")
    assert one.flops == 2 * rows * 2 * expert
    assert one.bytes == pytest.approx(4 * distinct * expert)
    assert one.launches == 3
    dense = 8 * 32 + 16 * 8
    assert phase(work, "linear").flops == 2 * rows * (2 * dense + 3 * 8 * 16 + 8 * 8)  # one dense layer, one router


def test_the_expected_number_of_experts_is_what_drawing_finds() -> None:
    rng = np.random.default_rng(0)
    drawn = [len({e for _ in range(6) for e in rng.permutation(8)[:2]}) for _ in range(4000)]
    read = phase(step_work(MIXED, prefill_shape(0, 6)), "experts").bytes / 4
    assert read / (3 * 8 * 6) == pytest.approx(np.mean(drawn), rel=0.01)


def test_windows_bound_what_a_group_reads() -> None:
    assert WINDOWED.cost.group_windows() == (None, 5)
    work = step_work(WINDOWED, decode_shape([50], (None, 5)))
    assert phase(work, "attention").flops == 4 * 16 * (50 + 5)
    with pytest.raises(ConfigError, match="the step's shape has 1 KV groups, mistral has 2"):
        step_work(WINDOWED, decode_shape([50]))


def test_the_share_of_the_largest_piece_is_that_of_one_head() -> None:
    assert phase(step_work(TINY, decode_shape([40])), "attention").serial == pytest.approx(1 / 2)
    assert phase(step_work(TINY, decode_shape([40, 40])), "attention").serial == pytest.approx(1 / 4)
    assert phase(step_work(TINY, StepShape(1, 1, 1, (40,), (40,))), "attention").serial == 0.0


def test_matrices_divided_among_devices_leave_each_its_part_and_an_exchange() -> None:
    model, shape = shapes.load("Llama-3-70B"), decode_shape([500] * 4)
    whole, part = step_work(model, shape), step_work(model, shape, tensor_parallel=4)
    assert part.flops == pytest.approx(whole.flops / 4)
    sent = phase(part, "exchange")
    assert sent.launches == 2 * 80
    assert sent.bytes == 160 * (2 * 3 / 4) * 4 * 8192 * 2
    latent = shapes.load("DeepSeek-V3")  # one latent for all heads: every device keeps it whole
    kept = [phase(step_work(latent, shape, tensor_parallel=n), "attention").bytes for n in (1, 8)]
    assert kept[1] > kept[0] / 2
    with pytest.raises(ConfigError, match="tensor_parallel must be at least 1"):
        step_work(model, shape, tensor_parallel=0)


def test_a_type_of_its_own_changes_bytes_not_operations() -> None:
    shape = decode_shape([10])
    four, two = step_work(TINY, shape), step_work(TINY, shape, "bfloat16")
    assert (two.flops, two.bytes, two.dtype) == (four.flops, four.bytes / 2, "bfloat16")
    with pytest.raises(ConfigError, match="dtype must be one of float32, bfloat16, float16, got 'int3'"):
        step_work(TINY, shape, "int3")


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 50)), min_size=1, max_size=5))
def test_work_of_a_step_is_at_most_that_of_its_spans_alone(spans: list[tuple[int, int]]) -> None:
    """Batching shares weights and changes nothing else: operations add up exactly."""

    def work(chosen: list[tuple[int, int]]) -> Work:
        return step_work(MIXED, spans_shape(chosen, len(chosen)))

    together, alone = work(spans), [work([span]) for span in spans]
    assert together.flops == pytest.approx(sum(one.flops for one in alone))
    assert together.bytes <= sum(one.bytes for one in alone) * (1 + 1e-9)


def test_parameters_of_cost_and_spec_agree() -> None:
    for model in (TINY, MIXED, WINDOWED, shapes.load("Qwen2.5-32B")):
        assert model.cost.n_parameters() == model.n_parameters()
        assert model.cost.kv_bytes_per_token(2) == model.kv_bytes_per_token(2)
        assert model.cost.cost is model.cost


def test_packed_experts_weigh_what_the_checkpoint_does() -> None:
    model: Any = shapes.load("gpt-oss-120b")
    assert model.weights_bytes() == pytest.approx(60.8 * 2**30, rel=0.02)  # the MXFP4 checkpoint
    assert model.weights_bytes("float32") > model.weights_bytes()
