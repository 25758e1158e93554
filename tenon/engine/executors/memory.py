"""Memory for what a step reads in full: caches and weights, in huge pages where the system grants them."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from typing import Final

import torch
from torch import Tensor

from tenon.base.errors import ResourceError

HUGE_PAGE: Final = 2**21


def zeros(shape: tuple[int, ...], like: Tensor, what: str) -> Tensor:
    """Zeroed memory of ``like``'s type and device. On CPU in huge pages: blocks lie scattered, and with small pages
    most of an attention's time goes into address translation. Raises ``ResourceError`` naming ``what``.
    """
    try:
        if like.device.type != "cpu":
            return like.new_zeros(shape)
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        n_bytes = math.prod(shape) * like.element_size()
        # From a whole huge page on, to a whole one: a mapping's own start and end get small pages, which for a small
        # model is all of it.
        memory = mmap.mmap(-1, -(-n_bytes // HUGE_PAGE) * HUGE_PAGE + HUGE_PAGE, flags=private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without huge pages refuses the wish; small pages do, more slowly
                memory.madvise(mmap.MADV_HUGEPAGE)
        start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
        return torch.frombuffer(memory, dtype=like.dtype, offset=start, count=math.prod(shape)).view(shape)
    except (RuntimeError, OSError) as error:
        raise ResourceError(f"no memory for {what}: {str(error).splitlines()[0]}") from error
