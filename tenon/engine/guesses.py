"""Guesses in a scheduler's steps: asked for before a step, given blocks that are left over, and what came true."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tenon.engine.assemble import Span
from tenon.engine.sequence import Seq
from tenon.engine.speculation.speculation import Speculation
from tenon.engine.speculation.tree import Tree, walk

if TYPE_CHECKING:
    from tenon.engine.scheduler import Scheduler


def draft(
    scheduler: Scheduler, speculation: Speculation, decodes: Sequence[Seq], now_s: float, *, may_have: bool
) -> int:
    """Trees for ``decodes``, all that do; returns how many nodes they have. ``may_have``: some may have one already."""
    if not decodes:
        return 0
    n_others = len(scheduler.running) - len(decodes) + len(scheduler.waiting)
    # Whatever is guessed, one row is left for a prompt.
    most = scheduler.config.max_step_tokens - len(decodes) - bool(n_others)
    n_prompt = _prompt_rows(scheduler, decodes) if n_others else 0
    return speculation.draft(decodes, most, now_s, n_prompt, may_have=may_have)


def _prompt_rows(scheduler: Scheduler, decodes: Sequence[Seq]) -> int:
    """About how many rows of prompts the step has room for, if ``decodes`` have no guesses; of who is at it or may
    come in."""
    config = scheduler.config
    prefills = [seq for seq in scheduler.running if not seq.is_decoding]
    left = sum(seq.n_tokens - seq.n_computed for seq in prefills)
    n_slots = config.max_sequences - sum(seq.n_slots for seq in scheduler.running)
    for seq in scheduler.waiting:
        n_slots -= seq.n_slots
        if n_slots < 0 or left >= config.max_step_tokens:
            break
        left += seq.n_tokens
    return min(left, scheduler.prompt_budget(decodes, prefills) - len(decodes)) if left else 0


def grow_trees(scheduler: Scheduler, spans: Iterable[Span]) -> None:
    """The trees of the step's sequences, as far as there are blocks for them: nobody gives way for a guess."""
    for span in spans:
        tree = span.seq.tree
        if tree is None:
            continue
        seq, end = span.seq, span.seq.n_tokens + len(tree)
        if end > seq.n_blocks * scheduler.config.block_tokens or seq.may_share:
            tree = tree.cut(scheduler.tables.room(seq, end) - seq.n_tokens)
        if len(tree):
            span.tree, span.n = tree, 1 + len(tree)


def take_over(scheduler: Scheduler, seq: Seq, tree: Tree, sampled: Sequence[int]) -> tuple[tuple[int, ...], list[int]]:
    """What of its tree came true is the sequence's, and one token more; returns these tokens and the rows that they
    were sampled from. ``sampled``: of each row, the root's first."""
    start, path = seq.n_computed, walk(tree, sampled)
    rows = [0, *(node + 1 for node in path)]
    tokens = tuple([sampled[row] for row in rows])
    end = seq.n_tokens + len(tokens)
    seq.tokens[seq.n_tokens : end] = tokens
    seq.n_tokens = end
    for k, row in enumerate(rows):
        if k != row:
            scheduler.tables.move(seq, start + row, start + k)
    seq.computed_to(start + len(rows))
    if seq.n_computed >= (seq.n_published + 1) * scheduler.config.block_tokens:
        scheduler.tables.publish(seq)
    if scheduler.speculation is not None:
        scheduler.speculation.verified(seq, tree, path)
    return tokens, rows
