"""Seconds of work on a device: hand-computed, monotone, and quick enough to ask at every step."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.base.errors import ConfigError
from tenon.cost import price
from tenon.cost.device import Device, Figure, Use, find
from tenon.cost.work import KINDS, Phase, StepShape, Work, spans_shape
from tenon.models import shapes
from tenon.models.spec import step_work

NEAR_EVERYTHING = 1e-9


def device(**use: object) -> Device:
    """1 GFLOP/s, 1 GB/s, all of both reached, nothing else unless said."""
    shares = dict.fromkeys(KINDS, 1.0)
    figure = Figure(1e9, "test", "today")
    settings: dict[str, object] = {"flops": shares, "bytes": shares, "sharpness": 2.0, "launch_s": 0.0} | use
    return Device("d", "d", "cpu", {"float32": figure}, figure, figure, Use(**settings))  # type: ignore[arg-type]


def work(*phases: Phase, rows: int = 1, spans: int = 1, outputs: int = 1) -> Work:
    return Work("float32", phases, rows, spans, outputs)


def test_the_norm_joins_arithmetic_and_traffic() -> None:
    phase = Phase("linear", 3e9, 4e9, 0)
    assert price.seconds(work(phase), device()) == pytest.approx(5.0)
    assert price.seconds(work(phase), device(sharpness=1.0)) == pytest.approx(7.0)
    assert price.seconds(work(phase), device(sharpness=200.0)) == pytest.approx(4.0)


def test_overheads_are_counted_per_kernel_step_span_row_and_output() -> None:
    one = device(
        launch_s=1.0, step_s=10.0, span_s=100.0, row_s=1e3, output_s=1e4, sync_s=1e5, host_step_s=1e6, host_span_s=1e7
    )
    asked = work(Phase("linear", 0.0, 0.0, 3), rows=5, spans=2, outputs=4)
    executor = 3 + 10 + 200 + 5e3 + 4e4 + 1e5
    assert price.seconds(asked, one, host=False) == pytest.approx(executor)
    assert price.seconds(asked, one) == pytest.approx(executor + 1e6 + 2e7)


def test_what_fits_into_the_cache_comes_faster() -> None:
    one = device(cache_bytes=1e9, cache_gain=4.0)
    assert price.seconds(work(Phase("linear", 0, 1e9, 0)), one) == pytest.approx(0.25)
    assert price.seconds(work(Phase("linear", 0, 3e9, 0)), one) == pytest.approx(2.25)


def test_activations_come_as_fast_however_many_there_are() -> None:
    one = device(cache_bytes=1e9, cache_gain=4.0)
    both = work(Phase("linear", 0, 1e9, 0), Phase("rowwise", 0, 3e9, 0))
    assert price.seconds(both, one) == pytest.approx(0.25 + 3.0)


def test_a_piece_that_cannot_be_divided_keeps_other_workers_waiting() -> None:
    one = device(workers=4)
    assert price.seconds(work(Phase("attention", 1e9, 0, 0, serial=1.0)), one) == pytest.approx(4.0)
    assert price.seconds(work(Phase("attention", 1e9, 0, 0, serial=0.1)), one) == pytest.approx(1.0)


def test_rows_of_trees_may_take_more_arithmetic_and_chunks_a_look_at_their_rows() -> None:
    phase = Phase("attention", 3e9, 0, 0, branched=2e9)
    assert price.seconds(work(phase), device(branch_factor=1.5)) == pytest.approx(4.0)
    assert price.seconds(work(rows=5, outputs=1), device(chunk_s=1.0)) == pytest.approx(1.0)
    assert price.seconds(work(rows=5, outputs=5), device(chunk_s=1.0)) == pytest.approx(0.0)


def test_an_exchange_goes_over_the_link_and_needs_one() -> None:
    h100 = find("H100")
    link, share = h100.links[0], h100.use.bytes["exchange"]
    moved = Work("bfloat16", (Phase("exchange", 0.0, 1e9, 10),), 1, 1, 1)
    found = price.breakdown(moved, h100)
    assert found.phases["exchange"] == pytest.approx(1e9 / (link.rate_Bps.value * share))
    assert found.launches == pytest.approx(10 * link.latency_s.value)
    with pytest.raises(ConfigError, match="d has no link"):
        price.seconds(work(Phase("exchange", 0.0, 1.0, 1)), device())


def test_a_type_without_arithmetic_is_refused() -> None:
    with pytest.raises(ConfigError, match="V100 has no arithmetic in bfloat16; price the model as float16"):
        price.seconds(Work("bfloat16", (), 1, 1, 1), find("V100"))


DEVICES = {
    "H200": find("H200"),
    "EPYC-9654": find("EPYC-9654"),
    "two cores with a cache": find("EPYC-9654").with_use(
        workers=2,
        cache_bytes=3e7,
        cache_gain=4.0,
        sharpness=1.7,
        span_s=1e-6,
        row_s=1e-7,
        output_s=1e-6,
        host_step_s=1e-4,
    ),
}
MODELS = ("SmolLM2-135M", "Qwen3-30B-A3B", "gpt-oss-20b", "DeepSeek-V3")
Spans = list[tuple[int, int]]
spans = st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 300)), min_size=1, max_size=8)


def cost_of(spans: Spans, model: str, on: Device) -> float:
    spec = shapes.load(model)
    return price.seconds(step_work(spec, spans_shape(spans, len(spans), spec.cost.group_windows())), on)


@pytest.mark.parametrize("on", DEVICES)
@given(spans=spans, which=st.integers(0, 7), more=st.integers(1, 500), model=st.sampled_from(MODELS))
def test_more_tokens_more_context_and_more_sequences_never_cost_less(
    on: str, spans: Spans, which: int, more: int, model: str
) -> None:
    i, where = which % len(spans), DEVICES[on]
    start, n = spans[i]
    base = cost_of(spans, model, where) * (1 - NEAR_EVERYTHING)
    assert cost_of([*spans[:i], (start, n + more), *spans[i + 1 :]], model, where) >= base
    assert cost_of([*spans[:i], (start + more, n), *spans[i + 1 :]], model, where) >= base
    assert cost_of([*spans, (more, 1 + which)], model, where) >= base


@given(spans=spans, model=st.sampled_from(MODELS))
def test_the_breakdown_adds_up(spans: Spans, model: str) -> None:
    spec = shapes.load(model)
    asked = step_work(spec, spans_shape(spans, len(spans), spec.cost.group_windows()), tensor_parallel=2)
    for name in ("H200", "MI300X"):
        assert price.breakdown(asked, find(name)).total == pytest.approx(price.seconds(asked, find(name)))
    local = DEVICES["two cores with a cache"]
    alone = step_work(spec, spans_shape(spans, len(spans), spec.cost.group_windows()))
    assert price.breakdown(alone, local).total == pytest.approx(price.seconds(alone, local))


def test_a_price_looks_at_nothing_but_its_phases() -> None:
    """Asked at every simulated step: no table is built again for a device and a type that were priced before."""
    one = dataclasses.replace(find("H200"))
    asked = step_work(shapes.load("Qwen3-30B-A3B"), StepShape(8, 8, 8, (800,), (800,)))
    price.seconds(asked, one)
    before = price._rates.cache_info().misses
    for _ in range(100):
        price.seconds(asked, one)
    assert price._rates.cache_info().misses == before
