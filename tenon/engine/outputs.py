"""Outputs of a step besides the tokens that are sampled: rows of prompts that somebody wants to know something of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
from numpy.typing import NDArray

from tenon.engine.step import I32, Params, Step

Ints = NDArray[np.int64] | I32


def with_outputs(
    step: Step, want: int, seqs: Sequence[int], n_logprobs: Sequence[int], rows: Sequence[Ints], places: Sequence[Ints]
) -> Step:
    """``step`` with outputs at its end that want this and no sampling: of each of ``seqs`` its ``rows`` in the step,
    which are at these ``places`` among its outputs."""
    count = [len(each) for each in rows]
    R, S, n_params = sum(count), len(seqs), len(step.params.seed)
    params = Params(
        temperature=np.zeros(S, np.float32), top_k=np.zeros(S, np.int32), top_p=np.ones(S, np.float32),
        min_p=np.zeros(S, np.float32), seed=np.zeros(S, np.uint64), sample=np.zeros(S, np.int32),
        n_logprobs=np.array(n_logprobs, np.int32),
    )  # fmt: skip
    joined = {f.name: np.concatenate((getattr(step.params, f.name), getattr(params, f.name))) for f in fields(Params)}
    return replace(
        step,
        out_row=_more(step.out_row, np.concatenate(rows).astype(np.int32)),
        out_seq=np.concatenate((step.out_seq, np.repeat(np.array(seqs, np.int64), count))),
        out_position=_more(step.out_position, np.concatenate(places).astype(np.int32)),
        want=np.concatenate((step.want, np.full(R, want, np.uint8))),
        params_index=_more(step.params_index, np.repeat(n_params + np.arange(S, dtype=np.int32), count)),
        bitmask_index=_more(step.bitmask_index, np.full(R, -1, np.int32)),
        params=Params(**joined),
        edit_start=_more(step.edit_start, np.full(R, step.edit_start[-1], np.int32)),
        score_start=_more(step.score_start, np.full(R, step.score_start[-1], np.int32)),
    )


def _more(one: I32, other: I32) -> I32:
    return np.concatenate((one, other))
