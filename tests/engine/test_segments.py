"""A prefill with holes leaves the K, V and logits of a full one: bit for bit in invariant mode, closely in fast mode.

The acceptance list of AsymCache (arXiv 2606.02964): random holes, chunkings, company and block sizes, for every kind of
attention; and what must fail does.
"""

from __future__ import annotations

import pytest

from tests.engine.build import Labs
from tests.engine.segments import FORMS, differences, draw, prefill, serve

pytestmark = pytest.mark.torch

MODELS = ("llama-mha", "llama-tied-llama3", "llama-mqa", "qwen3-window", "mixtral-window", "qwen3_moe")
LABS = [(name, dtype) for name in MODELS for dtype in ("fp32", "bf16")]
SIZES = (1, 2, 4, 8, 16, 64)


def cases() -> list[object]:
    """Every model, type, block size and form of holes; in each run one form of each of the others."""
    made = []
    for m, (name, dtype) in enumerate(LABS):
        for s, size in enumerate(SIZES):
            for f, form in enumerate(FORMS):
                marks = () if (m + s) % len(FORMS) == f else pytest.mark.slow
                seed = (m, s, f)
                made.append(pytest.param(name, dtype, size, form, seed, id=f"{name}-{dtype}-{size}-{form}", marks=marks))
    return made


@pytest.mark.parametrize(("name", "dtype", "size", "form", "seed"), cases())
def test_holes_leave_the_bits_of_a_full_prefill(
    name: str, dtype: str, size: int, form: str, seed: tuple[int, ...], lab: Labs
) -> None:
    it = lab(name, dtype, numerics="invariant")
    works = draw(form, size, seed)
    for found, each in zip(serve(it, works, size), works, strict=True):
        assert len(found.logits) == (~each.resident).sum()
        assert not differences(found, prefill(it.executor, it.groups, each.tokens))
