"""Blocked attention for training against the decoder's own operator."""

from __future__ import annotations

import pytest
import torch

from tenon.models import ops
from tenon.training.attention import batched

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(("length", "heads", "groups"), [(40, 4, 2), (300, 3, 1), (512, 2, 2)])
def test_values_and_gradients_follow_the_operator(length: int, heads: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(2)
    batch, dim = 2, 16
    q, k, v = (
        torch.randn(batch * length, n, dim, generator=generator, requires_grad=True) for n in (heads, groups, groups)
    )
    ours = batched(batch, length)(q, k, v, 0, 0.25, 0).float()
    parts = [slice(i * length, (i + 1) * length) for i in range(batch)]
    right = torch.cat([ops.attend(q[p], k[p], v[p], 0, 0.25, 0) for p in parts])
    assert (ours - right).abs().max() < 0.04
    grad = torch.randn(right.shape, generator=generator)
    for mine, true in zip(
        torch.autograd.grad(ours, (q, k, v), grad), torch.autograd.grad(right, (q, k, v), grad), strict=True
    ):
        assert (mine - true).abs().max() < 0.02 * true.abs().max()


def test_rows_do_not_see_each_other_nor_ahead() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(64, 1, 8, generator=generator)
    attend = batched(2, 32)
    before = attend(x, x, x, 0, 1.0, 0)
    changed = x.clone()
    changed[20:32] += 1.0
    after = attend(changed, changed, changed, 0, 1.0, 0)
    assert torch.equal(before[:20], after[:20])
    assert torch.equal(before[32:], after[32:])
    assert not torch.equal(before[20:32], after[20:32])


def test_a_window_is_refused() -> None:
    x = torch.zeros(4, 1, 8)
    with pytest.raises(ValueError, match="window"):
        batched(1, 4)(x, x, x, 3, 1.0, 2)
