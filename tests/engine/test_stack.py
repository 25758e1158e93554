"""The layers as one C call: what it covers, what a spoilt row may not touch, where its memory lies."""

from __future__ import annotations

import pytest
import torch

from tenon.engine.config import EngineConfig
from tenon.engine.executors.memory import HUGE_PAGE, zeros
from tenon.engine.executors.stack import Stack, uncovered
from tenon.engine.executors.torch import TorchExecutor
from tenon.models.checkpoint import random_decoder
from tenon.models.spec import ModelSpec, MoeSpec
from tests.engine.build import Run, step

pytestmark = pytest.mark.torch


def spec(**changes: object) -> ModelSpec:
    shape = {"vocab_size": 97, "hidden_size": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32}
    return ModelSpec(**({"family": "qwen3_moe", "intermediate_size": 96, "max_position": 256} | shape | changes))  # type: ignore[arg-type]


def executor(shape: ModelSpec, spoilt_token: int | None = None) -> TorchExecutor:
    decoder = random_decoder(shape, 1, torch.float32)
    if spoilt_token is not None:
        with torch.no_grad():
            decoder.embed.weight[spoilt_token] = float("nan")
    made = TorchExecutor(decoder, EngineConfig(), on_phase=lambda *_: None)
    made.allocate(shape.kv_groups("m", 16, 4), 16)
    return made


@pytest.mark.parametrize(
    ("changes", "dtype", "why"),
    [
        ({}, torch.float32, None),
        ({}, torch.bfloat16, None),
        ({}, torch.float16, "float16"),
        ({"head_dim": 48}, torch.float32, "head size 48"),
        ({"intermediate_size": 95}, torch.bfloat16, "odd width"),
        ({"moe": MoeSpec(4, 2, 33, True, (0,))}, torch.bfloat16, "odd width"),
    ],
)
def test_what_the_kernels_cover(changes: dict[str, object], dtype: torch.dtype, why: str | None) -> None:
    said = uncovered(spec(**changes), dtype)
    assert said is None if why is None else why in str(said)


def test_a_shape_that_is_not_covered_runs_in_torch_and_says_so() -> None:
    made = executor(spec(head_dim=48))
    assert "head size 48" in " ".join(made.caps.notes)
    assert not made.caps.invariant
    assert made.logits(step([Run(0, [1, 2], [0, 1], [[1]], [1])])).isfinite().all()


@pytest.mark.parametrize("moe", [None, MoeSpec(8, 3, 48, True, (0, 1)), MoeSpec(5, 5, 32, False, (1,))])
def test_a_spoilt_row_is_named_and_touches_no_other(moe: MoeSpec | None) -> None:
    made = executor(spec(moe=moe), spoilt_token=5)
    assert isinstance(made.forward, Stack)
    good = Run(0, [1, 2, 3], [0, 1, 2], [[1]], [0, 1, 2])
    alone = made.logits(step([good]))
    company = step([good, Run(1, [7, 5, 8], [0, 1, 2], [[2]], [2])])
    together = made.logits(company)
    assert torch.equal(together[:3], alone)
    assert together[3].isnan().all()
    result = made.poll(made.submit(company))
    assert set(result.errors) == {1}


def test_memory_begins_on_a_whole_huge_page_and_is_zero() -> None:
    for n in (1, HUGE_PAGE // 4, HUGE_PAGE // 4 + 1):
        got = zeros((n,), torch.empty(0), "a test")
        assert got.data_ptr() % HUGE_PAGE == 0
        assert got.shape == (n,)
        assert not got.any()
