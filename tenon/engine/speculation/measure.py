"""How long steps of few and of many rows take on the machine that is to run them, measured before the first request.

What is forced is what is measured: each step has the rows of as many sequences, all of which give a token. They read a
context of zeros, for which any block will do, and write to the null block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from tenon.base.clock import Clock
from tenon.engine.config import EngineConfig
from tenon.engine.executors.base import Executor
from tenon.engine.policies.step_time import KNOTS
from tenon.engine.step import SAMPLE, GroupStep, Params, Step
from tenon.models.spec import KVGroup

CONTEXT: Final = 256
REPEATS: Final = 5
"""Of which the quickest counts."""
WARM_UP: Final = 8
"""Steps of one row before any counts; fewer where they are slow."""
LIMIT_S: Final = 2.0
LIMIT_ALONE_S: Final = 0.3
"""After which no larger step is begun; the second where nobody guesses, so that only forecasts go by it."""
MOST_ROWS: Final = 512


def step_times(
    executor: Executor,
    groups: Sequence[KVGroup],
    n_blocks: int,
    config: EngineConfig,
    clock: Clock,
    limit_s: float,
    max_len: int,
) -> dict[int, float]:
    """Seconds by rows, from one row on; in contexts of at most ``max_len`` tokens, for so many have positions."""
    size = config.block_tokens
    context = min(CONTEXT, (n_blocks - 1) * size, max_len)
    begin_s = clock.now_s()
    found: dict[int, float] = {}
    for _ in range(WARM_UP):
        executor.poll(executor.submit(_step(1, context, size, len(groups))))
        if clock.now_s() - begin_s > limit_s / 4:
            break
    for rows in KNOTS:
        if rows > min(config.max_step_tokens, MOST_ROWS) or (found and clock.now_s() - begin_s > limit_s):
            break
        step = _step(rows, context, size, len(groups))
        taken = []
        for _ in range(REPEATS):
            start_s = clock.now_s()
            executor.poll(executor.submit(step))
            taken.append(clock.now_s() - start_s)
        found[rows] = min(taken)
    return found


def _step(rows: int, context: int, size: int, n_groups: int) -> Step:
    table = np.arange(1, 1 + -(-context // size), dtype=np.int32)
    starts = np.arange(rows + 1, dtype=np.int32)
    slot = np.arange(rows, dtype=np.int32) % size  # of the null block
    group = GroupStep(slot, starts * len(table), np.tile(table, rows))
    no_ids, every = np.zeros(0, np.int32), np.zeros(rows, np.int32)
    params = Params(
        temperature=np.zeros(rows, np.float32), top_k=every, top_p=np.ones(rows, np.float32),
        min_p=np.zeros(rows, np.float32), seed=np.zeros(rows, np.uint64), sample=every,
        n_logprobs=np.full(rows, -1, np.int32),
    )  # fmt: skip
    return Step(
        id=0, model="", weights_version=0, bucket_T=rows, bucket_S=rows, n_steps=1,
        seq=-1 - np.arange(rows, dtype=np.int64), q_start=starts, tok=every, pos=np.full(rows, context - 1, np.int32),
        parent=np.full(rows, -1, np.int32), groups=(group,) * n_groups, out_row=starts[:-1],
        out_seq=-1 - np.arange(rows, dtype=np.int64), out_position=every, want=np.full(rows, SAMPLE, np.uint8),
        params_index=starts[:-1], bitmask_index=np.full(rows, -1, np.int32), params=params,
        bitmask=np.zeros((0, 0), np.uint32), edit_start=np.zeros(rows + 1, np.int32), edit_token=no_ids,
        edit_kind=np.zeros(0, np.uint8), edit_value=np.zeros(0, np.float32),
        score_start=np.zeros(rows + 1, np.int32), score_token=no_ids,
    )  # fmt: skip
