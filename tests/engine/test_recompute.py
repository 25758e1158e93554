"""What a block costs to compute once more: additive, linear in the position, flat beyond a window."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from tenon.cost.device import find as find_device
from tenon.cost.work import prefill_shape, spans_shape
from tenon.engine.recompute import recompute_cost
from tenon.models.shapes import find as find_model
from tenon.models.spec import CostShape, ModelSpec, MoeSpec, step_work

SIZE = 16
WINDOW = 1000
DENSE = ModelSpec("llama", 1000, 256, 8, 8, 4, 32, 704, 131_072)
ALL_WINDOWS = ModelSpec("mistral", 1000, 256, 8, 8, 4, 32, 704, 131_072, windows=(WINDOW,) * 8)
MIXED = ModelSpec("llama", 1000, 256, 4, 8, 4, 32, 704, 131_072, windows=(None, WINDOW, WINDOW, None))
EXPERTS = ModelSpec("qwen3_moe", 1000, 256, 4, 8, 4, 32, 704, 131_072, moe=MoeSpec(8, 2, 128, True, (1, 3)))
MODELS = {"dense": DENSE, "window": ALL_WINDOWS, "mixed": MIXED, "experts": EXPERTS}


def flops(model: ModelSpec | CostShape, holes: Sequence[tuple[int, int]]) -> float:
    """Of one step that fills all holes [start, end) of one context."""
    windows = tuple(model.cost.layers_by_window())
    return step_work(model, spans_shape([(s, e - s) for s, e in holes], 0, windows)).flops


def blocks(hole: tuple[int, int]) -> range:
    return range(*hole, SIZE)


@pytest.mark.parametrize("name", MODELS)
def test_a_hole_costs_what_its_blocks_cost(name: str) -> None:
    """Counts are whole numbers below 2^53: the sum is exact."""
    rng, cost_of = random.Random(0), recompute_cost(MODELS[name], SIZE)
    for _ in range(40):
        start = SIZE * rng.randrange(5000)
        hole = (start, start + SIZE * rng.randint(1, 200))
        assert flops(MODELS[name], [hole]) == sum(map(cost_of, blocks(hole)))


@pytest.mark.parametrize("name", MODELS)
def test_what_else_is_resident_does_not_matter(name: str) -> None:
    """Any set of holes of one context costs what its blocks cost, whichever blocks lie between them; a whole prefill
    is the hole that is left of nothing."""
    rng, cost_of = random.Random(1), recompute_cost(MODELS[name], SIZE)
    for _ in range(20):
        ends = sorted(rng.sample(range(3000), 8))
        holes = [(SIZE * s, SIZE * e) for s, e in zip(ends[::2], ends[1::2], strict=True)]
        assert flops(MODELS[name], holes) == sum(cost_of(p) for hole in holes for p in blocks(hole))
    assert flops(MODELS[name], [(0, 8192)]) == sum(map(cost_of, blocks((0, 8192))))


def test_a_count_by_rectangles_is_not_additive() -> None:
    """AsymCache's Eq. 4 counts rows x positions to the hole's end: the control for the tests above."""

    def rectangle(start: int, end: int) -> int:
        return (end - start) * end

    assert rectangle(0, 32) != rectangle(0, 16) + rectangle(16, 32)


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_full_attention_costs_linearly_in_the_position(name: str) -> None:
    model = MODELS[name]
    cost_of = recompute_cost(model, SIZE)
    per_token = SIZE * model.n_layers * 4 * model.q_size
    assert {cost_of(p + SIZE) - cost_of(p) for p in range(0, 100_000, SIZE)} == {SIZE * per_token}


def test_cost_is_flat_beyond_a_window() -> None:
    cost_of = recompute_cost(ALL_WINDOWS, SIZE)
    inside = [cost_of(p) for p in range(0, WINDOW - SIZE, SIZE)]
    assert inside == sorted(set(inside))
    assert len({cost_of(p) for p in range(WINDOW, 100_000, SIZE)}) == 1
    mixed = recompute_cost(MIXED, SIZE)
    assert {mixed(p + SIZE) - mixed(p) for p in range(1008, 9000, SIZE)} == {SIZE * SIZE * 2 * 4 * MIXED.q_size}


def test_the_cost_doubles_where_attention_equals_the_rest() -> None:
    """At p* = a / c (AsymCache, section 4: 8B about 26.6K tokens when all its parameters count)."""
    model = find_model("Llama-3.1-8B")
    cost = model.cost
    cost_of = recompute_cost(model, SIZE)
    turning = 2 * cost.resident_weights / (cost.n_layers * cost.pair_flops)
    assert 25_000 < turning < 31_000
    p = round(turning / SIZE) * SIZE
    assert cost_of(p) / cost_of(0) == pytest.approx(2.0, rel=2e-3)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen3-30B-A3B"])
def test_on_a_device_cost_grows_almost_linearly(name: str) -> None:
    cost_of = recompute_cost(find_model(name), SIZE, device=find_device("H200"))
    x = np.arange(0, 131_072, 1024)
    y = np.array([cost_of(int(p)) for p in x])
    assert (np.diff(y) > 0).all()
    residual = y - np.polyval(np.polyfit(x, y, 1), x)
    assert 1 - residual.var() / y.var() > 0.99


def test_on_more_devices_a_block_takes_less() -> None:
    model, device = find_model("Llama-3.1-8B"), find_device("H200")
    one, four = (recompute_cost(model, SIZE, device=device, n_devices=n) for n in (1, 4))
    assert all(four(p) < one(p) for p in (0, 1024, 100_000))


def test_seconds_are_a_share_of_a_chunk() -> None:
    """Not of a step of one block, in which reading the weights would hide the position."""
    model, device = find_model("Llama-3.1-8B"), find_device("H200")
    small, large = (recompute_cost(model, size, device=device) for size in (16, 32))
    assert large(4096) == pytest.approx(2 * small(4096))
    alone = prefill_shape(0, SIZE, tuple(model.cost.layers_by_window()), outputs=0)
    assert step_work(model, alone).bytes > model.weights_bytes() / 2
    assert small(30_000) > 1.5 * small(0)
