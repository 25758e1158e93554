"""The limits have the figures they promise; what they are is the machine's affair."""

import pytest

limits = pytest.importorskip("tenon.bench.limits")

pytestmark = pytest.mark.torch


def test_limits_measure_reading_and_products() -> None:
    one = limits.MachineLimits(gemm_size=64, buffer_bytes=2**22)
    one.setup({})
    metrics = one.sample()
    one.close()
    assert "read_1_threads_Bps" in metrics
    assert {"gemm_float32_flops_per_s", "gemm_bfloat16_flops_per_s"} <= metrics.keys()
    assert all(value > 0 for value in metrics.values())


def test_threads_double_up_to_the_number() -> None:
    assert [limits.powers(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


@pytest.mark.parametrize(("seconds_of_256", "tried"), [(1e-3, 4), (1.0, 1), (0.02, 2)])
def test_products_stop_growing_where_they_would_take_minutes(seconds_of_256: float, tried: int) -> None:
    spent = [seconds_of_256 * 8**i for i in range(4)]
    given = iter(spent)
    rate = limits.gemm_flops_per_s(limits.torch.float32, 2048, lambda product: next(given))
    assert rate == pytest.approx(2 * 256**3 / seconds_of_256)
    assert len(list(given)) == 4 - tried
